"""How the errors of a layer's outputs are weighed: by how much the model's outputs change; tensor maths only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ghostify.fitting.moments import Moments
from ghostify.fitting.row_sample import Rows
from ghostify.fitting.sensitivity import error_metric
from ghostify.numerics import error_scales


@dataclass(frozen=True, eq=False)
class ErrorMeasure:
    """The metric M (n x n) of a layer's error e, whose cost is e' M e, and the scales (n) of its channels' errors."""

    metric: Tensor
    scales: Tensor

    @property
    def weights(self) -> Tensor:
        """The cost of each channel's squared error (n)."""
        return self.metric.diagonal()

    def relative(self, squared_errors: Tensor) -> Tensor:
        """Squared errors (n) relative to the scales."""
        return squared_errors.clamp_min(0) / self.scales

    def cost(self, relative_errors: Tensor) -> float:
        """The cost of relative errors (n), without products of different channels."""
        return float((self.weights * self.scales * relative_errors).sum())


def error_measure(
    rows: Moments | Rows, sensitivity: Tensor | None, default_weights: Tensor, *, free_mean: bool
) -> ErrorMeasure:
    """The measure for outputs (n) whose values are the targets of `rows`.

    Its metric comes from the sensitivity of the model's outputs (n x n), or is `default_weights` (n) where that is not
    known. Scales are variances, or mean squares without a free mean; see `error_scales`.
    """
    variances = rows.target_variances(free_mean=free_mean)
    metric = torch.diag(default_weights) if sensitivity is None else error_metric(sensitivity, variances)
    return ErrorMeasure(metric, error_scales(variances, rows.mean_square_y, metric.diagonal()))


def usable_sensitivity(sensitivity: Tensor | None, kept_out: Tensor) -> Tensor | None:
    """The sensitivity to the outputs `kept_out` (n x n); None where it is not finite, or 0."""
    kept = None if sensitivity is None else sensitivity[kept_out][:, kept_out].double()
    return kept if kept is not None and kept.any() and kept.isfinite().all() else None
