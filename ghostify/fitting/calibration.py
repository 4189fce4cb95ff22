"""Calibration batches bound to a traced module's inputs: checked, split, stored, and divided among processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from ghostify.errors import GhostifyError
from ghostify.fitting.activation_store import ActivationStore, restore
from ghostify.fitting.batch_checks import BatchRunner, check_values, read_batches
from ghostify.fitting.distributed import rank_and_world_size
from ghostify.graph.batches import bind_batch, run_batch
from ghostify.graph.inputs import CallArguments, CallInputs, PlaceholderValues, cloned, tensor_leaves
from ghostify.graph.modes import eval_mode
from ghostify.numerics import outputs_match

INPUT_MEMORY_BYTES = 1 << 26
MAX_BATCH_VALUES = 16 * 3 * 224**2
HOLDOUT_EVERY = 8
IMAGES_PER_PASS = 8
HOLDOUT_RUNS = 8
MEMORY_FORMAT_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class CalibrationBatch:
    """`size` images of the calibration set, from image `first` on; `number` is the index of the user's batch.

    `converted_stored` holds the inputs of the converted model, where they differ.
    """

    number: int
    first: int
    size: int
    stored: CallInputs
    memory_format: torch.memory_format = torch.preserve_format
    converted_stored: CallInputs | None = None

    @property
    def inputs(self) -> CallInputs:
        """A copy of the inputs of the original module, in `memory_format`: a forward may overwrite it."""
        return _copied(self.stored, self.memory_format)

    @property
    def converted_inputs(self) -> CallInputs:
        """A copy of the inputs of the converted module, in `memory_format`."""
        return _copied(self.stored if self.converted_stored is None else self.converted_stored, self.memory_format)

    @property
    def can_be_split(self) -> bool:
        """Whether inputs of some of the images can be taken out."""
        return self.size == 1 or len(split(self.stored, 1)) == self.size

    def inputs_of(self, rows: Tensor) -> CallInputs:
        """A copy of the inputs of some images, in `memory_format`; of a batch that is not split, all inputs."""
        if self.size == 1 or not self.can_be_split:
            return self.inputs
        selected = tree_map_only(Tensor, lambda v: v[rows.to(v.device)], tree_map(restore, self.stored))
        return to_memory_format(selected, self.memory_format)


@dataclass(frozen=True, eq=False)
class CalibrationBatches:
    """This process's batches, and the number of images of all processes."""

    local_batches: tuple[CalibrationBatch, ...]
    images: int


def bind_calibration(
    module: nn.Module, calibration: Iterable[Any] | CalibrationBatches, example: Any = None
) -> CalibrationBatches:
    """The batches of `calibration` as inputs of `module`, as `bind_batch` binds them in the form of `example`.

    Large batches are split. Those of a loader are stored, beyond 64 MiB in temporary files; those of a list remain the
    caller's. With several processes, each passes the whole set and keeps its share of the batches. Floating-point
    inputs are converted to the model's type where it does not run on theirs. Raises `GhostifyError`, with the number of
    the batch, for one that lacks an argument, that the model does not run on or that has values that are not finite,
    and for an empty set.
    """
    if isinstance(calibration, CalibrationBatches):
        return calibration
    store = None if isinstance(calibration, Tensor | Mapping | Sequence) else ActivationStore(INPUT_MEMORY_BYTES)
    (rank, processes), batch_count, images = rank_and_world_size(), 0, 0
    local_batches: list[CalibrationBatch] = []
    runner = BatchRunner(module)
    for number, batch in enumerate(read_batches(calibration)):
        inputs = bind_batch(module, batch, example, f"calibration batch {number}")
        check_values(inputs, number)
        inputs = runner.runnable(inputs, split(inputs, 1)[0], number)
        first = tensor_leaves(inputs)[0]
        for piece in split(inputs, max(1, MAX_BATCH_VALUES * len(first) // first.numel())):
            size = count_images(piece)
            if batch_count % processes == rank:
                stored = piece if store is None else tree_map(store.put, piece)
                local_batches.append(CalibrationBatch(number, images, size, stored))
            batch_count, images = batch_count + 1, images + size
    if batch_count < processes:
        raise GhostifyError(
            "calibration: yields no batches. Pass a list or a DataLoader, not an exhausted iterator."
            if not batch_count
            else f"calibration: yields {batch_count} batches for {processes} processes. "
            "Use smaller batches, or fewer processes."
        )
    memory_format = _fastest_memory_format(module, split(local_batches[0].inputs, 1)[0])
    return CalibrationBatches(tuple(replace(batch, memory_format=memory_format) for batch in local_batches), images)


def split(inputs: CallInputs, images: int) -> list[CallInputs]:
    """Inputs for up to `images` images each; not split where their tensors differ in the number of images, or where
    they are those of a module without a graph."""
    if isinstance(inputs, CallArguments):
        return [inputs]
    sizes = {len(v) if v.dim() else 0 for v in inputs.values if isinstance(v, Tensor)}
    if len(sizes) != 1 or any(tensor_leaves(v) for v in inputs.values if not isinstance(v, Tensor)):
        return [inputs]
    pieces = [v.split(images) if isinstance(v, Tensor) else repeat(v) for v in inputs.values]
    return [PlaceholderValues(values) for values in zip(*pieces, strict=False)]


@dataclass(frozen=True, eq=False)
class FewImages:
    """Some images of calibration batch `number`, from image `first` of the calibration set on."""

    number: int
    first: int
    inputs: CallInputs
    weight: float = 1.0


def first_images(batches: CalibrationBatches, images: int) -> Iterator[FewImages]:
    """This process's share of the first `images` images, few at a time.

    A process without any of them yields another image with weight 0, so that all processes compute the same sums.
    """
    local_batches = [batch for batch in batches.local_batches if batch.first < images]
    if not local_batches:
        batch = batches.local_batches[0]
        yield FewImages(batch.number, batch.first, split(batch.inputs, 1)[0], 0.0)
    for batch in local_batches:
        first, batch_inputs = batch.first, split(batch.inputs, images - batch.first)[0]
        for inputs in split(batch_inputs, IMAGES_PER_PASS):
            yield FewImages(batch.number, first, inputs)
            first += count_images(inputs)


def _copied(stored: CallInputs, memory_format: torch.memory_format) -> CallInputs:
    return to_memory_format(cloned(tree_map(restore, stored)), memory_format)


def to_memory_format(inputs: CallInputs, memory_format: torch.memory_format) -> CallInputs:
    """The inputs with their images in `memory_format`."""

    def convert(value: Any) -> Any:
        return value.to(memory_format=memory_format) if isinstance(value, Tensor) and value.dim() == 4 else value

    return tree_map(convert, inputs)


def holdout_mask(numbers: Tensor, images: int) -> Tensor:
    """Which of a set of `images` images are in the holdout, by number: an eighth, none of a single one.

    Neighbours may be crops of one picture or frames of one video, so that the holdout is up to `HOLDOUT_RUNS` runs of
    consecutive images, spread over the set.
    """
    every, length = min(HOLDOUT_EVERY, images), max(1, images // (HOLDOUT_EVERY * HOLDOUT_RUNS))
    return numbers % (every * length) >= max(every - 1, 1) * length


def count_images(inputs: CallInputs) -> int:
    """Number of images in the inputs: the length of the first tensor that has one, or of a list of single images."""
    tensors = [v for v in tensor_leaves(inputs) if v.dim() > 0]
    has_tensor_input = isinstance(inputs, PlaceholderValues) and any(isinstance(v, Tensor) for v in inputs.values)
    is_image_list = not has_tensor_input and all(v.dim() == 3 for v in tensors)
    return len(tensors) if is_image_list else len(tensors[0])


def _fastest_memory_format(module: nn.Module, inputs: CallInputs) -> torch.memory_format:
    """Channels last on a CPU, where it makes convolutions faster, if the model's outputs are the same with it."""
    if any(v.device.type != "cpu" for v in tensor_leaves(inputs)):
        return torch.preserve_format
    with eval_mode(module):
        try:
            expected, channels_last = (
                tensor_leaves(run_batch(module, to_memory_format(inputs, memory_format), 0))
                for memory_format in (torch.preserve_format, torch.channels_last)
            )
        except GhostifyError:  # one image, or channels last, is not what the model runs on
            return torch.preserve_format
    is_equal = bool(expected) and outputs_match(channels_last, expected, MEMORY_FORMAT_TOLERANCE)
    return torch.channels_last if is_equal else torch.preserve_format
