"""Some images of calibration batches, chosen by number: those of a half of the set, or of the holdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostify.fitting.calibration import CalibrationBatch, CalibrationBatches, holdout_mask, split
from ghostify.graph.inputs import CallInputs

IMAGES_PER_FORWARD = 16

ImageChoice = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ChosenImages:
    """`size` chosen images of calibration batch `number`, the first of them being image `first` of the set.

    The inputs are those of the chosen images. Where a batch cannot be split they are those of all of its images, of
    which `rows` are chosen.
    """

    number: int
    first: int
    size: int
    inputs: CallInputs
    rows: Tensor | None = None

    def of(self, values: Tensor) -> Tensor:
        """The values (N x ...) of the chosen images; all values where they are not one for each image."""
        is_by_image = self.rows is not None and values.dim() > 0 and len(values) == len(self.rows)
        return values[self.rows] if is_by_image else values


def choose_images(batches: CalibrationBatches, choice: ImageChoice) -> Iterator[ChosenImages]:
    """This process's images whose numbers `choice` selects, in inputs for up to `IMAGES_PER_FORWARD` images."""
    for batch, rows in _chosen_rows(batches, choice):
        first, count = batch.first + int(rows.nonzero()[0]), int(rows.sum())
        if not batch.can_be_split:
            yield ChosenImages(batch.number, first, count, batch.inputs, rows)
            continue
        for k, inputs in enumerate(split(batch.inputs_of(rows), IMAGES_PER_FORWARD)):
            size = min(IMAGES_PER_FORWARD, count - k * IMAGES_PER_FORWARD)
            yield ChosenImages(batch.number, first + k * IMAGES_PER_FORWARD, size, inputs)


def selected_batches(batches: CalibrationBatches, choice: ImageChoice) -> CalibrationBatches:
    """Calibration batches of the images whose numbers `choice` selects; batches that cannot be split stay whole."""
    chosen = choice(torch.arange(batches.images))
    positions, pieces = chosen.cumsum(0) - 1, []
    for batch, rows in _chosen_rows(batches, choice):
        is_split, first = batch.can_be_split, int(positions[batch.first + int(rows.nonzero()[0])])
        size, inputs = (int(rows.sum()), batch.inputs_of(rows)) if is_split else (batch.size, batch.stored)
        pieces.append(CalibrationBatch(batch.number, first, size, inputs, batch.memory_format))
    return CalibrationBatches(tuple(pieces), int(chosen.sum()))


def _chosen_rows(batches: CalibrationBatches, choice: ImageChoice) -> Iterator[tuple[CalibrationBatch, Tensor]]:
    """This process's batches with chosen images, and which of their images are chosen."""
    for batch in batches.local_batches:
        rows = choice(torch.arange(batch.first, batch.first + batch.size))
        if rows.any():
            yield batch, rows


def even_images(images: int, limit: int) -> ImageChoice:
    """At most `limit` of the even image numbers below `images`, evenly spaced."""
    step = max(1, -(-((images + 1) // 2) // limit))
    return lambda numbers: (numbers % 2 == 0) & (numbers // 2 % step == 0)


def odd_images(images: int, limit: int) -> ImageChoice:
    """At most `limit` of the odd image numbers below `images`, evenly spaced."""
    step = max(1, -(-(images // 2) // limit))
    return lambda numbers: (numbers % 2 == 1) & (numbers // 2 % step == 0)


def holdout_images(images: int) -> ImageChoice:
    """The images of the holdout of a set of so many images."""
    return lambda numbers: holdout_mask(numbers, images)
