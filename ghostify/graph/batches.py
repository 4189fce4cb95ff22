"""Which arguments of a forward the elements of a batch fill, and forwards of batches."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.errors import GhostifyError
from ghostify.graph.inputs import CallArguments, CallInputs, as_arguments, bind_inputs, call_model
from ghostify.text import first_line

POSITIONAL_KINDS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
ANY_ARGUMENTS = inspect.signature(lambda *args, **kwargs: None)  # noqa: ARG005


def bind_batch(module: nn.Module, batch: Any, example: Any = None, where: str = "batch") -> CallInputs:
    """The inputs for one forward of a batch of a data set. Elements that are no inputs, such as labels, are dropped.

    The elements of a tuple or list fill the arguments that the example inputs `example` fill; without an example those
    without default, at least the first. A dict fills the arguments that its keys name; where the example is a dict too,
    only those of the example and those without default. Where the example is one argument that is a list of tensors or
    a dict, such a list or dict is that argument. Raises `GhostifyError`, which names the batch by `where`, where an
    argument without default gets no value.
    """
    signature = _signature(module)
    args, kwargs = ((batch,), {}) if _is_one_argument(batch, example) else as_arguments(batch)
    if isinstance(batch, Mapping) and kwargs:
        kwargs = _known_keywords(signature, kwargs, example)
    elif isinstance(example, Mapping):
        args, kwargs = (), dict(zip(_in_order(signature, example), args, strict=False))
    else:
        args = args[: _positional_count(signature, example)]
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise GhostifyError(
            f"{where}: {error} of forward. Pass a tensor, a tuple of arguments or a dict of keywords that the forward "
            "takes, as in example_inputs."
        ) from error
    return bind_inputs(module, args, kwargs) if isinstance(module, fx.GraphModule) else CallArguments(args, kwargs)


def run_batch(module: nn.Module, inputs: CallInputs, number: int) -> Any:
    """The output of one forward on calibration batch `number`; raises `GhostifyError` where the model does not run."""
    try:
        return call_model(module, inputs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise batch_error(number, error) from error


def batch_error(number: int, error: Exception) -> GhostifyError:
    """The error that the model does not run on calibration batch `number`; an error of ghostify's own is kept."""
    if isinstance(error, GhostifyError):
        return error
    return GhostifyError(
        f"calibration batch {number}: the model does not run on it ({type(error).__name__}: {first_line(error)}). "
        "Pass batches of the shape, type and device that its forward takes, as in example_inputs."
    )


def _signature(module: nn.Module) -> inspect.Signature:
    """The arguments of a forward; any arguments where they are not known, as for scripted modules."""
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):
        return ANY_ARGUMENTS


def _is_one_argument(batch: Any, example: Any) -> bool:
    """Whether the example is one argument that is a list of tensors or a dict, and the batch is such a value itself."""
    args, kwargs = as_arguments(example)
    names, values = list(kwargs), [*args, *kwargs.values()]
    if len(values) != 1 or example is None:
        return False
    if isinstance(values[0], Mapping):
        return isinstance(batch, Mapping) and not any(name in batch for name in names)
    if not (isinstance(values[0], list | tuple) and isinstance(batch, list | tuple) and batch):
        return False
    tensors = [*values[0], *batch]
    return all(isinstance(v, Tensor) for v in tensors) and len({v.dim() for v in tensors}) == 1


def _known_keywords(signature: inspect.Signature, kwargs: dict[str, Any], example: Any) -> dict[str, Any]:
    """The keywords that the forward takes and, if the example has keywords, that are in it or have no default."""
    parameters = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        kwargs = {key: value for key, value in kwargs.items() if key in parameters}
    if not isinstance(example, Mapping):
        return kwargs
    return {key: value for key, value in kwargs.items() if key in example or _is_required(parameters.get(key))}


def _in_order(signature: inspect.Signature, keywords: Mapping[str, Any]) -> list[str]:
    """The keywords in the order of the forward's arguments, those of `**kwargs` last."""
    names = list(signature.parameters)
    return sorted(keywords, key=lambda key: names.index(key) if key in names else len(names))


def _positional_count(signature: inspect.Signature, example: Any) -> int:
    """How many elements of a tuple are arguments."""
    parameters = list(signature.parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        limit = float("inf")
    else:
        limit = sum(p.kind in POSITIONAL_KINDS for p in parameters)
    required = sum(_is_required(p) for p in parameters if p.kind in POSITIONAL_KINDS)
    count = max(1, required) if example is None else len(as_arguments(example)[0])
    return int(min(count, limit))


def _is_required(parameter: inspect.Parameter | None) -> bool:
    """Whether an argument has no default."""
    return (
        parameter is not None
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    )
