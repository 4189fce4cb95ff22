"""Sampled rows in place of their moments, for layers whose filters read very many values; tensor maths only.

The moments of a values take a^2 numbers. P rows take P a, and ridge regression on them needs P^2 more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ghostify.fitting.distributed import all_gather_rows
from ghostify.fitting.linear_solvers import MIN_RELATIVE_DAMPING, best_share, solve_damped
from ghostify.fitting.moments import Moments

MAX_MOMENT_FEATURES = 12_288
MAX_SAMPLED_ROWS = 2048
MAX_SAMPLE_BYTES = 1 << 28


def needs_rows(features: int) -> bool:
    """Whether the moments of so many features would take too much memory: more than about 1 GiB each."""
    return features > MAX_MOMENT_FEATURES


def sampled_rows_for(features: int) -> int:
    """The number of rows that are sampled for a layer of so many features."""
    return max(1, min(MAX_SAMPLED_ROWS, MAX_SAMPLE_BYTES // (4 * features)))


@dataclass(frozen=True, eq=False)
class Rows:
    """Features `u` (P x a) and targets `y` (P x n) of sampled rows, with the queries of `Moments` that a fit needs."""

    u: Tensor
    y: Tensor

    @property
    def count(self) -> Tensor:
        return torch.tensor(float(len(self.u)), dtype=torch.float64)

    @cached_property
    def mean_u(self) -> Tensor:
        return self.u.sum(0, dtype=torch.float64) / max(len(self.u), 1)

    @cached_property
    def mean_y(self) -> Tensor:
        return self.y.sum(0, dtype=torch.float64) / max(len(self.y), 1)

    @cached_property
    def mean_square_y(self) -> Tensor:
        """See `Moments`."""
        return self.y.square().sum(0, dtype=torch.float64) / max(len(self.y), 1)

    def projected(self, basis: Tensor) -> Moments:
        """Moments of the features that are `basis` (b x a) times these."""
        moments = Moments.zero(len(basis), self.y.shape[1])
        moments.add(self.u @ basis.T.to(self.u.dtype), self.y)
        return moments

    def covariance_of(self, filters: Tensor, *, free_mean: bool) -> Tensor:
        """See `Moments`."""
        maps = (self.u @ filters.to(self.u.dtype)).double()
        maps = maps - maps.mean(0) if free_mean else maps
        return maps.T @ maps / max(len(maps), 1)

    def target_variances(self, *, free_mean: bool) -> Tensor:
        """See `Moments`."""
        return (self.mean_square_y - float(free_mean) * self.mean_y.square()).clamp_min(0)

    def errors_of(self, filters: Tensor, channels: Tensor, *, free_mean: bool) -> Tensor:
        """See `Moments`."""
        targets = self.y[:, channels].double()
        errors = (self.u @ filters.to(self.u.dtype)).double() - targets
        return (errors - errors.mean(0) if free_mean else errors).square().mean(0)


class SplitRows:
    """Sampled rows that are fitted, and those of the holdout."""

    def __init__(self, features: int, targets: int) -> None:
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._empty = torch.zeros(0, features), torch.zeros(0, targets), torch.zeros(0, dtype=torch.bool)

    def add(self, u: Tensor, y: Tensor, holdout_rows: Tensor) -> None:
        """Add rows; `holdout_rows` (P, bool) marks those of the holdout."""
        self._rows.append((u, y, holdout_rows))

    def all_reduced(self) -> SplitRows:
        """The rows of all processes."""
        result = SplitRows(self._empty[0].shape[1], self._empty[1].shape[1])
        u, y, holdout = (all_gather_rows(torch.cat(parts)) for parts in zip(self._empty, *self._rows, strict=True))
        result.add(u, y, holdout)
        return result

    @cached_property
    def _all(self) -> tuple[Tensor, ...]:
        return tuple(torch.cat(parts) for parts in zip(self._empty, *self._rows, strict=True))

    @property
    def holdout(self) -> Rows:
        u, y, holdout = self._all
        return Rows(u[holdout], y[holdout])

    @property
    def is_split(self) -> bool:
        """Whether there are rows on both sides."""
        return bool(self._all[2].any()) and not bool(self._all[2].all())

    @cached_property
    def fitted_rows(self) -> Rows:
        """The rows that are fitted: all rows where one side is empty."""
        u, y, holdout = self._all
        return Rows(u[~holdout], y[~holdout]) if self.is_split else Rows(u, y)


def refit_on_rows(
    rows: SplitRows, prior: Tensor, weights: Tensor, ridges: tuple[float, ...], default: float, *, free_mean: bool
) -> Tensor:
    """The filters (a x n) of ridge regression on the rows towards `prior`, in its dual form.

    The ridge is the one of `ridges` with the smallest error on the holdout, weighted by `weights` (n), or `default`
    without a holdout; it is relative to the mean diagonal of the features' moments. As in `lstsq.refit_filters`, the
    best share of the change is made, and the holdout is not fitted.
    """
    if not rows.is_split:
        return _ridge(rows.fitted_rows, prior, default, free_mean=free_mean)
    best, least_error, every = prior, float("inf"), torch.arange(prior.shape[1])

    def holdout_error(filters: Tensor) -> float:
        return float((weights * rows.holdout.errors_of(filters, every, free_mean=free_mean)).sum())

    error_of_prior = holdout_error(prior)
    for ridge in ridges:
        change = _ridge(rows.fitted_rows, prior, ridge, free_mean=free_mean) - prior
        whole, opposite = holdout_error(prior + change), holdout_error(prior - change)
        slope, curvature = (opposite - whole) / 2, whole + opposite - 2 * error_of_prior
        share = best_share(slope, curvature)
        error = error_of_prior + share * (share * curvature / 2 - slope)
        if error < least_error:
            best, least_error = prior + share * change, error
    return best


def _ridge(rows: Rows, prior: Tensor, ridge: float, *, free_mean: bool) -> Tensor:
    """prior + U' (U U' + lambda P I)^-1 (Y - U prior), where lambda = ridge x the mean diagonal of U' U / P."""
    u, residual = rows.u, rows.y.double() - (rows.u @ prior.to(rows.u.dtype)).double()
    if free_mean:
        u, residual = u - rows.mean_u.to(u.dtype), residual - residual.mean(0)
    damping = max(ridge, MIN_RELATIVE_DAMPING) * u.square().sum(dtype=torch.float64) / u.shape[1]
    products = (u @ u.T).double()
    dual = solve_damped(products, residual, damping.clamp_min(torch.finfo(torch.float64).tiny))
    return prior + (u.T @ dual.to(u.dtype)).double()
