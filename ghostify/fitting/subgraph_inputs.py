"""Inputs of a subgraph in each of its calls, in the original and in the converted model, as calibration batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_map

from ghostify.fitting.activation_store import ActivationStore
from ghostify.fitting.calibration import INPUT_MEMORY_BYTES, CalibrationBatch, CalibrationBatches, count_images
from ghostify.fitting.distributed import all_reduce_sum
from ghostify.graph.batches import batch_error
from ghostify.graph.call_hooks import on_calls
from ghostify.graph.inputs import CallInputs, PlaceholderValues, bind_inputs, call_model, tensor_leaves
from ghostify.graph.modes import eval_mode
from ghostify.graph.program import Program

MAX_RELATIVE_DIFFERENCE = 0.5


def collect_subgraph_inputs(
    program: Program, converted: nn.Module, path: str, batches: CalibrationBatches
) -> CalibrationBatches | None:
    """The inputs of the subgraph at `path` as calibration batches; None where no batch calls it.

    Where the calls of the two models do not correspond, both get the inputs of the original: with another number or
    shape of values, as after a selection of proposals, or with a large difference between the values.
    """
    store = ActivationStore(INPUT_MEMORY_BYTES)
    subgraph_batches: list[CalibrationBatch] = []
    local_images = 0
    for batch in batches.local_batches:
        try:
            original_calls = record_calls(program.subgraphs[path], program.module, path, batch.inputs)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise batch_error(batch.number, error) from error
        converted_calls = record_calls(program.subgraphs[path], converted, path, batch.inputs)
        for k, inputs in enumerate(original_calls):
            if not any(v.dim() and len(v) for v in tensor_leaves(inputs)):
                continue
            converted_inputs = (
                converted_calls[k]
                if len(converted_calls) == len(original_calls) and _correspond(inputs, converted_calls[k])
                else None
            )
            size = count_images(inputs)
            stored = tree_map(store.put, inputs)
            converted_stored = None if converted_inputs is None else tree_map(store.put, converted_inputs)
            subgraph_batches.append(
                CalibrationBatch(batch.number, local_images, size, stored, converted_stored=converted_stored)
            )
            local_images += size
    images = int(all_reduce_sum(torch.tensor(float(local_images)))[0])
    return CalibrationBatches(tuple(subgraph_batches), images) if images else None


def record_calls(subgraph: fx.GraphModule, module: nn.Module, path: str, inputs: CallInputs) -> list[PlaceholderValues]:
    """The inputs of each call of the submodule at `path` in one forward, by the placeholders of `subgraph`.

    Those of calls under autocast are in the type of its weights; calls under transforms of torch.func are left out.
    """
    recorded: list[PlaceholderValues] = []
    dtype = next((p.dtype for p in subgraph.parameters() if p.is_floating_point()), torch.float32)

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = bind_inputs(subgraph, args, kwargs)
        if not any(is_functorch_wrapped_tensor(v) for v in tensor_leaves(bound)):
            recorded.append(tree_map(partial(_clone_tensor, dtype), bound))

    with on_calls([module.get_submodule(path)], before=record), eval_mode(module):
        call_model(module, inputs)
    return recorded


def _clone_tensor(dtype: torch.dtype, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    is_cast = value.is_floating_point() and torch.is_autocast_enabled(value.device.type)
    return value.detach().to(dtype if is_cast else value.dtype, copy=True)


def _correspond(inputs: CallInputs, others: CallInputs) -> bool:
    """Whether the inputs of two calls are equal up to an error."""
    pairs = list(zip(tensor_leaves(inputs), tensor_leaves(others), strict=False))
    if len(pairs) != len(tensor_leaves(others)) or any(a.shape != b.shape for a, b in pairs):
        return False
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    total = sum(float(torch.square(a.double()).sum()) for a, _ in pairs)
    return difference <= MAX_RELATIVE_DIFFERENCE * total
