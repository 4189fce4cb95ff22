"""Errors of a fitted layer on the holdout: the calibration images that are excluded from its fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ghostify.fitting.distributed import all_reduce_sum
from ghostify.numerics import relative_by_channel


@dataclass(frozen=True, eq=False)
class HoldoutErrors:
    """Relative squared error of each output channel (n), and the predicted error of the model's outputs, if known.

    `output_error` is trace(G E), with the sensitivity G and the second moments E of the errors; see
    `output_sensitivity`.
    """

    relative: Tensor
    output_error: float | None


class HoldoutSums:
    """Sums over holdout positions: products of the errors of n channels, the targets, and their squares."""

    def __init__(self, channels: int) -> None:
        self._sums = torch.zeros(channels + 2, channels, dtype=torch.float64)
        self._count = torch.zeros((), dtype=torch.float64)

    def add(self, estimate: Tensor, target: Tensor) -> None:
        """Add the positions of one batch (P x n, float64)."""
        error = estimate - target
        self._sums += torch.cat((error.T @ error, torch.stack((target.sum(0), target.square().sum(0)))))
        self._count += len(target)

    def errors(self, sensitivity: Tensor | None, *, free_mean: bool) -> HoldoutErrors | None:
        """Errors over all processes, relative to the targets' variance, or to their mean square without a free mean.

        None without holdout positions.
        """
        sums, count = all_reduce_sum(self._sums, self._count)
        if not count:
            return None
        n = sums.shape[1]
        products, (mean, power) = sums[:n] / count, sums[n:] / count
        variance = power - mean.square() if free_mean else power
        output_error = None if sensitivity is None else float((sensitivity * products).sum())
        return HoldoutErrors(relative_by_channel(products.diagonal(), variance, power), output_error)
