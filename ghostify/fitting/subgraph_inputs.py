"""What arrives at a part of a model: the inputs of each of its calls, in the original and in the converted model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from ghostify.fitting.activation_store import Shelf
from ghostify.fitting.calibration import IN_MEMORY, Batch, Batches, images_of
from ghostify.fitting.distributed import summed
from ghostify.graph.call_hooks import on_calls
from ghostify.graph.inputs import Inputs, PlaceholderValues, bind_inputs, run, tensors_of
from ghostify.graph.modes import evaluating
from ghostify.graph.program import Program

APART = 0.5


def arriving(program: Program, converted: nn.Module, path: str, batches: Batches) -> Batches | None:
    """The calls of the part at `path` as a calibration set for it.

    Where the calls of the two models do not correspond - another number or shape of values, as behind a choice of
    proposals, or values that have little in common - both are fed what the original is. None where no batch reaches
    the part.
    """
    shelf = Shelf(IN_MEMORY)
    found: list[Batch] = []
    seen = 0
    for batch in batches.own:
        originals = calls_of(program.parts[path], program.module, path, batch.inputs)
        others = calls_of(program.parts[path], converted, path, batch.inputs)
        for k, inputs in enumerate(originals):
            if not any(v.dim() and len(v) for v in tensors_of(inputs)):
                continue
            other = others[k] if len(others) == len(originals) and _correspond(inputs, others[k]) else None
            size = images_of(inputs)
            stored = tree_map(shelf.put, inputs)
            otherwise = None if other is None else tree_map(shelf.put, other)
            found.append(Batch(batch.number, seen, size, stored, otherwise=otherwise))
            seen += size
    images = int(summed(torch.tensor(float(seen)))[0])
    return Batches(tuple(found), images) if images else None


def calls_of(part: fx.GraphModule, module: nn.Module, path: str, inputs: Inputs) -> list[PlaceholderValues]:
    """What each call of the part at `path` of a module is fed in one forward, by the placeholders of `part`."""
    found: list[PlaceholderValues] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(tree_map(_kept, bind_inputs(part, args, kwargs)))

    with on_calls([module.get_submodule(path)], before=note), evaluating(module):
        run(module, inputs)
    return found


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _correspond(inputs: Inputs, others: Inputs) -> bool:
    """Whether two calls are fed the same but for an error."""
    pairs = list(zip(tensors_of(inputs), tensors_of(others), strict=False))
    if len(pairs) != len(tensors_of(others)) or any(a.shape != b.shape for a, b in pairs):
        return False
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    whole = sum(float(torch.square(a.double()).sum()) for a, _ in pairs)
    return apart <= APART * whole
