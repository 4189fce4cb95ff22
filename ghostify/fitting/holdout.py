"""Errors of a fitted layer on the holdout: the calibration images that are excluded from its fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ghostify.fitting.distributed import all_reduce_sum
from ghostify.fitting.error_measure import ErrorMeasure


@dataclass(frozen=True, eq=False)
class HoldoutErrors:
    """Relative squared error of each output channel (n), and the predicted error of the model's outputs, if known.

    `output_error` is trace(G E), with the sensitivity G and the second moments E of the errors; see
    `output_sensitivity`.
    """

    relative: Tensor
    output_error: float | None


class HoldoutSums:
    """Sums over holdout positions of the products of the errors of n channels."""

    def __init__(self, channels: int) -> None:
        self._sums = torch.zeros(channels, channels, dtype=torch.float64)
        self._count = torch.zeros((), dtype=torch.float64)

    def add(self, estimate: Tensor, target: Tensor) -> None:
        """Add the positions of one batch (P x n, float64)."""
        error = estimate - target
        self._sums += error.T @ error
        self._count += len(target)

    def errors(self, sensitivity: Tensor | None, measure: ErrorMeasure) -> HoldoutErrors | None:
        """Errors over all processes, relative to the scales of `measure`; None without holdout positions."""
        sums, count = all_reduce_sum(self._sums, self._count)
        if not count:
            return None
        products = sums / count
        output_error = None if sensitivity is None else float((sensitivity * products).sum())
        return HoldoutErrors(measure.relative(products.diagonal()), output_error)
