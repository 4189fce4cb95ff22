"""The difference between a model's outputs and the original's, summed over batches; tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MIN_CLASSES = 2


@dataclass(frozen=True)
class OutputComparison:
    """How far a model's outputs are from the original's on `images` images.

    `error` is their squared error relative to the variance of the original's, summed over the output tensors.
    `agreement` is the percentage of images whose largest output stays; None without outputs of N x classes.
    """

    error: float
    agreement: float | None
    images: int


@dataclass(frozen=True, eq=False)
class OutputSums:
    """Sums over images: squared errors, images, answers that stay, and all answers (`values`, float64).

    An answer is the largest of the outputs of N x classes. Sums of several processes add up.
    """

    values: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def add(
        self, outputs: Sequence[Tensor], expected: Sequence[Tensor], deviations: Sequence[Tensor], images: int
    ) -> None:
        """Add the outputs on some images, in place; each error is divided by its deviation, which is a scalar or
        broadcasts. NaN where the outputs do not correspond to those expected."""
        corresponds = [o.shape for o in outputs] == [o.shape for o in expected] and len(deviations) == len(expected)
        self.values[1] += images
        if not corresponds:
            self.values[0] = torch.nan
            return
        for output, original, deviation in zip(outputs, expected, deviations, strict=True):
            difference = torch.where(original.isfinite(), output - original, 0) / deviation.to(original.device)
            count = 1 if original.dim() and len(original) == images else images  # one value for all images
            self.values[0] += count * difference.double().square().sum().cpu()
            if original.dim() == 2 and original.shape[1] >= MIN_CLASSES and len(original) == images:
                self.values[2] += (output.argmax(1) == original.argmax(1)).sum().cpu()
                self.values[3] += images

    def comparison(self) -> OutputComparison | None:
        """The means over images; None without images, or where outputs did not correspond."""
        error, images, staying, answers = self.values.tolist()
        if not images or error != error:
            return None
        return OutputComparison(error / images, 100 * staying / answers if answers else None, int(images))
