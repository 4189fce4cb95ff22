"""Input tensors of runtimes: limits of worker processes, memory format and batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

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


def with_batch_of_two(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs with a batch of one repeated: exporters treat a size of one as a constant."""
    return tuple(tree_map_only(Tensor, lambda t: torch.cat((t, t)) if t.dim() and len(t) == 1 else t, args))
