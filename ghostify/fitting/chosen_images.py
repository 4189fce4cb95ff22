"""Some images of calibration batches, chosen by number: those of a half of the set, or of the holdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ghostify.fitting.calibration import CalibrationBatches, holdout_mask, split
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
    for batch in batches.local_batches:
        rows = choice(torch.arange(batch.first, batch.first + batch.size))
        if not rows.any():
            continue
        first = batch.first + int(rows.nonzero()[0])
        if batch.size > 1 and len(split(batch.stored, 1)) != batch.size:
            yield ChosenImages(batch.number, first, int(rows.sum()), batch.inputs, rows)
            continue
        chosen = tree_map_only(Tensor, lambda v, rows=rows: v[rows.to(v.device)], batch.inputs)
        for k, inputs in enumerate(split(chosen, IMAGES_PER_FORWARD)):
            size = min(IMAGES_PER_FORWARD, int(rows.sum()) - k * IMAGES_PER_FORWARD)
            yield ChosenImages(batch.number, first + k * IMAGES_PER_FORWARD, size, inputs)


def even_images(numbers: Tensor) -> Tensor:
    """The images with even numbers."""
    return numbers % 2 == 0


def odd_images(images: int, limit: int) -> ImageChoice:
    """At most `limit` of the odd image numbers below `images`, evenly spaced."""
    step = max(1, -(-(images // 2) // limit))
    return lambda numbers: (numbers % 2 == 1) & (numbers // 2 % step == 0)


def holdout_images(images: int) -> ImageChoice:
    """The images of the holdout of a set of so many images."""
    return lambda numbers: holdout_mask(numbers, images)
