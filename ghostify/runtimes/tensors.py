"""Inputs of runtimes: their names and batch size in a file, memory format, limits of worker processes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import MappingKey, tree_flatten_with_path, tree_map_only

from ghostify.graph.inputs import as_arguments, tensor_leaves

Runner = Callable[..., list[Tensor]]
UNKNOWN_TO_NUMPY = (torch.bfloat16,)


def unsupported_by_worker(example: Any) -> str | None:
    """The error, with its remedy, if a worker process on the CPU cannot run these inputs; None if it can."""
    args, kwargs = as_arguments(example)
    tensors = tensor_leaves((args, kwargs))
    if any(t.device.type != "cpu" for t in tensors):
        remedy = "Use runtime 'eager' on a GPU, or move model and example_inputs to the CPU."
        return f"is timed on the CPU. {remedy}"
    if any(t.dtype in UNKNOWN_TO_NUMPY for t in tensors):
        return "is timed in float32. Convert model.float() with such inputs."
    if kwargs:
        return "takes no keyword inputs. Pass example_inputs as a tuple."
    return None


def to_channels_last(values: Any) -> Any:
    """The same values, tensors of four dimensions laid out N x H x W x C."""
    memory_format = torch.channels_last
    return tree_map_only(Tensor, lambda t: t.contiguous(memory_format=memory_format) if t.dim() == 4 else t, values)


@dataclass(frozen=True, eq=False)
class ExportInputs:
    """What one forward takes, and whether a file takes other batch sizes: sizes of every tensor's first dimension."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    free_batch: bool = True

    def doubled(self, *, single_only: bool = False) -> ExportInputs:
        """The inputs with every tensor repeated along the batch; with `single_only` those of batch size 1 alone."""

        def double(t: Tensor) -> Tensor:
            return torch.cat((t, t)) if t.dim() and (len(t) == 1 or not single_only) else t

        return replace(self, args=tree_map_only(Tensor, double, self.args), kwargs=self._kwargs(double))

    def _kwargs(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        changed: dict[str, Any] = tree_map_only(Tensor, change, self.kwargs)
        return changed

    def in_order_of(self, module: nn.Module) -> ExportInputs:
        """The inputs with keywords in the order of the module's arguments, which torch.export takes for granted."""
        order = [name for name in inspect.signature(module.forward).parameters if name in self.kwargs]
        return replace(self, kwargs={name: self.kwargs[name] for name in (*order, *self.kwargs)})

    def names(self, module: nn.Module) -> list[str]:
        """A name for each tensor in order: its argument's, or its key in a dict where only one tensor has that key."""
        named = _argument_names(module, self.args, self.kwargs)
        short = [key or name for name, key, _ in named]
        return [s if short.count(s) == 1 else name for s, (name, _, _) in zip(short, named, strict=True)]


def by_name(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors by the names of a file's inputs: by their own where they have one of these, else in order."""
    leaves = list(_named_leaves(("", value) for value in args)) + list(_named_leaves(kwargs.items()))
    keys = [key if key in names else name for name, key, _ in leaves]
    remaining = iter([name for name in names if name not in keys])
    return {key if key in names else next(remaining): tensor for key, (_, _, tensor) in zip(keys, leaves, strict=True)}


def to_array(tensor: Tensor) -> Any:
    """The tensor as a NumPy array on the CPU."""
    return tensor.detach().cpu().contiguous().numpy()


def _argument_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, str, Tensor]]:
    names: list[str] = []
    for name, parameter in inspect.signature(module.forward).parameters.items():
        is_variadic = parameter.kind is parameter.VAR_POSITIONAL
        names += [f"{name}_{k}" for k in range(len(args) - len(names))] if is_variadic else [name]
    return list(_named_leaves([*zip(names, args, strict=False), *kwargs.items()]))


def _named_leaves(arguments: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, str, Tensor]]:
    """A full name, the innermost key in a dict, or "", and the tensor, for all tensors in named arguments."""
    for argument, value in arguments:
        for path, leaf in tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                keys = [str(getattr(step, "key", getattr(step, "idx", getattr(step, "name", "")))) for step in path]
                in_dict = bool(path) and isinstance(path[-1], MappingKey) and keys[-1].isidentifier()
                yield "_".join((argument, *keys)), keys[-1] if in_dict else "", leaf
