"""What arrives at a part of a model: the inputs of each of its calls, in the original and in the converted model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from ghostify.fitting.activation_store import ActivationStore
from ghostify.fitting.calibration import IN_MEMORY, CalibrationBatch, CalibrationBatches, count_images
from ghostify.fitting.distributed import all_reduce_sum
from ghostify.graph.call_hooks import on_calls
from ghostify.graph.inputs import CallInputs, PlaceholderValues, bind_inputs, call_model, tensor_leaves
from ghostify.graph.modes import eval_mode
from ghostify.graph.program import Program

MAX_RELATIVE_DIFFERENCE = 0.5


def collect_subgraph_inputs(
    program: Program, converted: nn.Module, path: str, batches: CalibrationBatches
) -> CalibrationBatches | None:
    """The calls of the part at `path` as a calibration set for it.

    Where the calls of the two models do not correspond - another number or shape of values, as behind a choice of
    proposals, or values that have little in common - both are fed what the original is. None where no batch reaches
    the part.
    """
    shelf = ActivationStore(IN_MEMORY)
    found: list[CalibrationBatch] = []
    seen = 0
    for batch in batches.local_batches:
        originals = record_calls(program.subgraphs[path], program.module, path, batch.inputs)
        others = record_calls(program.subgraphs[path], converted, path, batch.inputs)
        for k, inputs in enumerate(originals):
            if not any(v.dim() and len(v) for v in tensor_leaves(inputs)):
                continue
            other = others[k] if len(others) == len(originals) and _correspond(inputs, others[k]) else None
            size = count_images(inputs)
            stored = tree_map(shelf.put, inputs)
            otherwise = None if other is None else tree_map(shelf.put, other)
            found.append(CalibrationBatch(batch.number, seen, size, stored, converted_stored=otherwise))
            seen += size
    images = int(all_reduce_sum(torch.tensor(float(seen)))[0])
    return CalibrationBatches(tuple(found), images) if images else None


def record_calls(part: fx.GraphModule, module: nn.Module, path: str, inputs: CallInputs) -> list[PlaceholderValues]:
    """What each call of the part at `path` of a module is fed in one forward, by the placeholders of `part`."""
    found: list[PlaceholderValues] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(tree_map(_kept, bind_inputs(part, args, kwargs)))

    with on_calls([module.get_submodule(path)], before=note), eval_mode(module):
        call_model(module, inputs)
    return found


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _correspond(inputs: CallInputs, others: CallInputs) -> bool:
    """Whether two calls are fed the same but for an error."""
    pairs = list(zip(tensor_leaves(inputs), tensor_leaves(others), strict=False))
    if len(pairs) != len(tensor_leaves(others)) or any(a.shape != b.shape for a, b in pairs):
        return False
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    whole = sum(float(torch.square(a.double()).sum()) for a, _ in pairs)
    return apart <= MAX_RELATIVE_DIFFERENCE * whole
