"""Inputs of a forward: batches bound to the arguments of a module or the placeholders of a traced module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map_only

from ghostify.errors import GhostifyError
from ghostify.text import first_line


@dataclass(frozen=True, eq=False)
class PlaceholderValues:
    """The values of a traced module's placeholders for one forward, in order."""

    values: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class CallArguments:
    """Positional and keyword arguments of one forward of a module that has no graph."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


CallInputs = PlaceholderValues | CallArguments

register_pytree_node(
    PlaceholderValues, lambda inputs: (list(inputs.values), None), lambda values, _: PlaceholderValues(tuple(values))
)
register_pytree_node(
    CallArguments, lambda inputs: ([inputs.args, inputs.kwargs], None), lambda children, _: CallArguments(*children)
)


def as_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a forward, from a tensor, a tuple or list, or a dict of keywords."""
    if batch is None:
        return (), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def placeholders(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a traced module's inputs, in order."""
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def bind_inputs(module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PlaceholderValues:
    """The values of a traced module's placeholders, in order, for a call with `args` and `kwargs`.

    A placeholder `*name` takes the remaining positional arguments as a tuple, `**name` the remaining keywords. Raises
    `GhostifyError` where a placeholder without default gets no value.
    """
    values: list[Any] = []
    positional, named = list(args), dict(kwargs)
    for node in placeholders(module):
        name = str(node.target)
        if name.startswith("**"):
            values.append(named)
        elif name.startswith("*"):
            values.append(tuple(positional))
        elif name in named:
            values.append(named.pop(name))
        elif positional:
            values.append(positional.pop(0))
        elif node.args:
            values.append(node.args[0])
        else:
            raise GhostifyError(f"example_inputs or calibration: input {name!r} is missing. Pass a value for it.")
    return PlaceholderValues(tuple(values))


def bind_example(module: nn.Module, batch: Any) -> CallInputs:
    """The inputs for one forward of `batch`: placeholder values of a traced module, arguments of any other."""
    args, kwargs = as_arguments(batch)
    return bind_inputs(module, args, kwargs) if isinstance(module, fx.GraphModule) else CallArguments(args, kwargs)


def cloned(values: Any) -> Any:
    """Nested values with a copy of every tensor."""
    return tree_map_only(Tensor, torch.clone, values)


def call_model(module: nn.Module, inputs: CallInputs) -> Any:
    """The output of one forward of a module, traced or not. It gets a copy of the inputs, which it may overwrite."""
    inputs = cloned(inputs)
    if isinstance(inputs, CallArguments):
        return module(*inputs.args, **inputs.kwargs)
    assert isinstance(module, fx.GraphModule)
    args, kwargs = unbind_inputs(module, inputs)
    return nn.Module.__call__(module, *args, **kwargs)  # GraphModule's own prints notes on an error


def run_example(module: nn.Module, inputs: CallInputs) -> Any:
    """The output for the example inputs; raises `GhostifyError` where the model does not run on them."""
    try:
        return call_model(module, inputs)
    except GhostifyError:
        raise
    except Exception as error:
        raise GhostifyError(
            f"example_inputs: the model does not run on them ({type(error).__name__}: {first_line(error)}). "
            "Pass inputs of the shape and type that its forward takes (--input-size)."
        ) from error


def unbind_inputs(module: fx.GraphModule, inputs: PlaceholderValues) -> tuple[list[Any], dict[str, Any]]:
    """The positional and keyword arguments of a call that give a traced module's placeholders these values."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for node, value in zip(placeholders(module), inputs.values, strict=True):
        name = str(node.target)
        if name.startswith("**"):
            kwargs |= value
        elif name.startswith("*"):
            args += value
        else:
            args.append(value)
    return args, kwargs


def values_of(inputs: CallInputs) -> tuple[Any, ...]:
    """The placeholder values of the inputs of a traced module."""
    assert isinstance(inputs, PlaceholderValues)
    return inputs.values


def tensor_leaves(values: Any) -> list[Tensor]:
    """All tensors in nested inputs or outputs, in order."""
    return [v for v in tree_leaves(values) if isinstance(v, Tensor)]
