"""A calibration set as batches bound to a traced module's inputs: checked, cut, kept, and shared among processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ghostify.errors import GhostifyError
from ghostify.fitting.activation_store import ActivationStore, restore
from ghostify.fitting.distributed import rank_and_world_size
from ghostify.graph.inputs import CallArguments, CallInputs, PlaceholderValues, bind_batch, call_model, tensor_leaves
from ghostify.graph.modes import eval_mode
from ghostify.numerics import outputs_match

IN_MEMORY = 1 << 26
MAX_BATCH_VALUES = 16 * 3 * 224**2
HOLDOUT_EVERY = 8
FORM_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class CalibrationBatch:
    """`size` images of the calibration set, from number `first` on; `number` is the user's batch they come from.

    `converted_stored` is what the converted model is fed in their place, where that differs.
    """

    number: int
    first: int
    size: int
    stored: CallInputs
    memory_format: torch.memory_format = torch.preserve_format
    converted_stored: CallInputs | None = None

    @property
    def inputs(self) -> CallInputs:
        """What the module takes, laid out in `memory_format`."""
        return to_memory_format(tree_map(restore, self.stored), self.memory_format)

    @property
    def converted_inputs(self) -> CallInputs:
        """What the converted module takes."""
        return (
            self.inputs
            if self.converted_stored is None
            else to_memory_format(tree_map(restore, self.converted_stored), self.memory_format)
        )


@dataclass(frozen=True, eq=False)
class CalibrationBatches:
    """This process's batches, and the number of images of all processes."""

    local_batches: tuple[CalibrationBatch, ...]
    images: int


def bind_calibration(module: nn.Module, calibration: Iterable[Any] | CalibrationBatches) -> CalibrationBatches:
    """The batches of `calibration`, as `module` takes them; further elements of a tuple, such as labels, are left out.

    Large ones are cut. Those that come from a loader are kept, beyond 64 MiB in temporary files; those of a list stay
    the caller's. Of several processes, each passes the whole set and keeps every so many-th batch. Raises
    `GhostifyError` for a set that is empty, or holds values that are not finite.
    """
    if isinstance(calibration, CalibrationBatches):
        return calibration
    if isinstance(calibration, Tensor | Mapping):
        calibration = [calibration]
    shelf = None if isinstance(calibration, Sequence) else ActivationStore(IN_MEMORY)
    (rank, processes), parts, seen = rank_and_world_size(), 0, 0
    own: list[CalibrationBatch] = []
    for number, batch in enumerate(calibration):
        inputs = bind_batch(module, batch)
        _check_finite(inputs, number)
        first = tensor_leaves(inputs)[0]
        for part in split(inputs, max(1, MAX_BATCH_VALUES * len(first) // first.numel())):
            size = count_images(part)
            if parts % processes == rank:
                own.append(CalibrationBatch(number, seen, size, part if shelf is None else tree_map(shelf.put, part)))
            parts, seen = parts + 1, seen + size
    if parts < processes:
        raise GhostifyError(
            "calibration yields no batches: pass a list or a DataLoader, not a spent iterator"
            if not parts
            else f"calibration yields {parts} batches for {processes} processes: use smaller batches"
        )
    memory_format = _fast_form(module, split(own[0].inputs, 1)[0])
    return CalibrationBatches(tuple(replace(batch, memory_format=memory_format) for batch in own), seen)


def split(inputs: CallInputs, images: int) -> list[CallInputs]:
    """Inputs for up to `images` images each; whole where their tensors do not agree on how many there are,
    and where they are those of a module without a graph."""
    if isinstance(inputs, CallArguments):
        return [inputs]
    sizes = {len(v) if v.dim() else 0 for v in inputs.values if isinstance(v, Tensor)}
    if len(sizes) != 1 or any(tensor_leaves(v) for v in inputs.values if not isinstance(v, Tensor)):
        return [inputs]
    parts = [v.split(images) if isinstance(v, Tensor) else repeat(v) for v in inputs.values]
    return [PlaceholderValues(part) for part in zip(*parts, strict=False)]


def to_memory_format(inputs: CallInputs, memory_format: torch.memory_format) -> CallInputs:
    """The inputs with their images laid out in `memory_format`."""

    def laid_out(value: Any) -> Any:
        return value.to(memory_format=memory_format) if isinstance(value, Tensor) and value.dim() == 4 else value

    return tree_map(laid_out, inputs)


def holdout_mask(numbers: Tensor, every: int = HOLDOUT_EVERY) -> Tensor:
    """Which images are held out, by number: the last of every `every`, none of one."""
    return numbers % every == max(every - 1, 1)


def count_images(inputs: CallInputs) -> int:
    """How many images the inputs hold: the length of the first tensor that has one, or of a list of single images."""
    tensors = [v for v in tensor_leaves(inputs) if v.dim() > 0]
    apart = isinstance(inputs, PlaceholderValues) and any(isinstance(v, Tensor) for v in inputs.values)
    listed = not apart and all(v.dim() == 3 for v in tensors)
    return len(tensors) if listed else len(tensors[0])


def _fast_form(module: nn.Module, inputs: CallInputs) -> torch.memory_format:
    """Channels last on a CPU, where convolutions run faster so, if the model does the same with such images."""
    if any(v.device.type != "cpu" for v in tensor_leaves(inputs)):
        return torch.preserve_format
    with eval_mode(module):
        try:
            as_given, last = (
                tensor_leaves(call_model(module, to_memory_format(inputs, memory_format)))
                for memory_format in (torch.preserve_format, torch.channels_last)
            )
        except (RuntimeError, TypeError):
            return torch.preserve_format
    alike = bool(as_given) and outputs_match(last, as_given, FORM_TOLERANCE)
    return torch.channels_last if alike else torch.preserve_format


def _check_finite(inputs: CallInputs, number: int) -> None:
    tensors = tensor_leaves(inputs)
    if not tensors or tensors[0].dim() == 0 or tensors[0].numel() == 0:
        raise GhostifyError(f"calibration batch {number}: holds no images")
    if not all(t.isfinite().all() for t in tensors if t.is_floating_point()):
        raise GhostifyError(f"calibration batch {number}: holds NaN or infinite values")
