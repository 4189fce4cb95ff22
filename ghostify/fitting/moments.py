"""Streaming second moments: constant memory, additive over batches and processes; tensor maths only."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ghostify.fitting.distributed import all_reduce_sum

if TYPE_CHECKING:
    from typing_extensions import Self

CHUNK_ROWS = 8192
SMALL_CHUNK_ROWS = 1024
TILE_ROWS = 512


@dataclass(frozen=True, eq=False)
class TargetSums:
    """Sums over rows with n targets: `count` rows, the targets `y` and their squares `yy` (n); float64.

    Subclasses add further sums. The sum of two instances is that of all rows.
    """

    count: Tensor
    y: Tensor
    yy: Tensor

    def add_targets(self, y: Tensor) -> None:
        """Add the targets of rows (P x n), in place."""
        self.count.add_(len(y))
        self.y.add_(y.sum(0, dtype=torch.float64))
        self.yy.add_(y.square().sum(0, dtype=torch.float64))

    def all_reduced(self) -> Self:
        return type(self)(*all_reduce_sum(*(getattr(self, f.name) for f in fields(self))))

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, eq=False)
class Moments(TargetSums):
    """Sums of features u (a values) and of their products with each other and with the targets.

    `upper` (a x a) holds the products of the features, valid on and above the diagonal only; `uy` is a x n.
    """

    u: Tensor
    upper: Tensor
    uy: Tensor

    @classmethod
    def zero(cls, features: int, targets: int) -> Moments:
        feature_sums = zeros(features), zeros(features, features), zeros(features, targets)
        return cls(zeros(), zeros(targets), zeros(targets), *feature_sums)

    def add(self, u: Tensor, y: Tensor) -> None:
        """Add rows u (P x a) and y (P x n), in place. Products of chunks of rows are summed in float64."""
        for us, ys in zip(u.split(CHUNK_ROWS), y.split(CHUNK_ROWS), strict=True):
            self.add_targets(ys)
            self.u.add_(us.sum(0, dtype=torch.float64))
            for a in range(0, us.shape[1], TILE_ROWS):
                self.upper[a : a + TILE_ROWS, a:].add_(us[:, a : a + TILE_ROWS].T @ us[:, a:])
            self.uy.add_(us.T @ ys)

    @property
    def uu(self) -> Tensor:
        full = self.upper.clone()
        for a in range(0, len(full), TILE_ROWS):
            b = min(a + TILE_ROWS, len(full))
            full[a:b, a:b] = full[a:b, a:b].triu() + full[a:b, a:b].triu(1).T
            full[b:, a:b] = full[a:b, b:].T
        return full

    def projected(self, basis: Tensor) -> Moments:
        """Moments of the features that are `basis` (b x a) times these."""
        return replace(self, u=basis @ self.u, upper=basis @ self.uu @ basis.T, uy=basis @ self.uy)

    @cached_property
    def mean_u(self) -> Tensor:
        return self.u / self.count.clamp_min(1)

    @cached_property
    def mean_y(self) -> Tensor:
        return self.y / self.count.clamp_min(1)

    @property
    def mean_square_y(self) -> Tensor:
        """The mean square of each target (n)."""
        return self.yy / self.count.clamp_min(1)

    def covariance_of(self, filters: Tensor, *, free_mean: bool) -> Tensor:
        """The covariance (b x b) of the maps of `filters` (a x b), or their mean products without a free mean."""
        return filters.T @ (self.centred() if free_mean else self.raw())[0] @ filters

    def target_variances(self, *, free_mean: bool) -> Tensor:
        """The variance of each target (n), or its mean square without a free mean."""
        return (self.mean_square_y - float(free_mean) * self.mean_y.square()).clamp_min(0)

    def errors_of(self, filters: Tensor, channels: Tensor, *, free_mean: bool) -> Tensor:
        """Squared errors (b) of the targets `channels` as predicted by `filters` (a x b)."""
        uu, uy, yy = self.centred() if free_mean else self.raw()
        uy, yy = uy[:, channels], yy[channels]
        return yy - 2 * (filters * uy).sum(0) + (filters * (uu @ filters)).sum(0)

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances (uu, uy) and variances (y) of the rows so far."""
        uu, uy, yy = self.raw()
        uu.addr_(self.mean_u, self.mean_u, alpha=-1)
        uy.addr_(self.mean_u, self.mean_y, alpha=-1)
        return uu, uy, (yy - self.mean_y.square()).clamp_min(0)

    def raw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean products (uu, uy) and squares (y), means included."""
        n = self.count.clamp_min(1)
        return self.uu.div_(n), self.uy / n, self.yy / n


@dataclass(frozen=True, eq=False)
class SplitMoments:
    """Moments of the rows that are fitted, and of those of the holdout."""

    fitted: Moments
    holdout: Moments

    @classmethod
    def zero(cls, features: int, targets: int) -> SplitMoments:
        return cls(Moments.zero(features, targets), Moments.zero(features, targets))

    def add(self, u: Tensor, y: Tensor, holdout_rows: Tensor) -> None:
        """Add rows; `holdout_rows` (P, bool) marks those of the holdout."""
        self.fitted.add(u[~holdout_rows], y[~holdout_rows])
        self.holdout.add(u[holdout_rows], y[holdout_rows])

    def all_reduced(self) -> SplitMoments:
        return SplitMoments(self.fitted.all_reduced(), self.holdout.all_reduced())

    @property
    def is_split(self) -> bool:
        """Whether there are rows on both sides."""
        return bool(self.holdout.count) and bool(self.fitted.count)

    @cached_property
    def fitted_rows(self) -> Moments:
        """The rows that are fitted: all rows where one side is empty."""
        return self.fitted if self.is_split else self.fitted + self.holdout


@dataclass(frozen=True, eq=False)
class PerMapMoments(TargetSums):
    """Sums of n maps at D taps and of n targets, without products of different maps.

    `v` is D x n, `auto` n x D x D, `cross` D x n x n (tap, map, target).
    """

    v: Tensor
    auto: Tensor
    cross: Tensor

    @classmethod
    def zero(cls, maps: int, taps: int) -> PerMapMoments:
        map_sums = zeros(taps, maps), zeros(maps, taps, taps), zeros(taps, maps, maps)
        return cls(zeros(), zeros(maps), zeros(maps), *map_sums)

    def add(self, v: Tensor, y: Tensor) -> None:
        """Add rows v (P x D x n) and y (P x n), in place."""
        for vs, ys in zip(v.split(CHUNK_ROWS), y.split(CHUNK_ROWS), strict=True):
            self.add_targets(ys)
            by_map = vs.permute(2, 1, 0).contiguous()
            self.v.add_(vs.sum(0, dtype=torch.float64))
            self.auto.add_(by_map @ by_map.mT)
            self.cross.add_((vs.flatten(1).T @ ys).reshape(self.cross.shape))


@dataclass(frozen=True, eq=False)
class AssignedMoments(TargetSums):
    """Sums of m maps at D taps and of n targets, each of which is assigned to one map.

    `v` is m x D, `auto` m x D x D, `cross` n x D.
    """

    v: Tensor
    auto: Tensor
    cross: Tensor

    @classmethod
    def zero(cls, maps: int, taps: int, targets: int) -> AssignedMoments:
        map_sums = zeros(maps, taps), zeros(maps, taps, taps), zeros(targets, taps)
        return cls(zeros(), zeros(targets), zeros(targets), *map_sums)

    def add(self, v: Tensor, y: Tensor, source: Tensor) -> None:
        """Add rows v (P x D x m) and y (P x n), in place; `source` (n) is the index of the map of each target."""
        ranks = rank_in_group(source)
        for vs, ys in zip(v.split(SMALL_CHUNK_ROWS), y.split(SMALL_CHUNK_ROWS), strict=True):
            self.add_targets(ys)
            by_map = vs.permute(2, 1, 0).contiguous()
            targets = by_map.new_zeros(int(ranks.max()) + 1, len(by_map), len(ys))
            targets[ranks, source] = ys.T
            self.v.add_(by_map.sum(2, dtype=torch.float64))
            self.auto.add_(by_map @ by_map.mT)
            self.cross.add_((by_map @ targets.permute(1, 2, 0))[source, :, ranks])


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def rank_in_group(source: Tensor) -> Tensor:
    """For every ghost, the number of ghosts with the same source before it."""
    order = source.argsort(stable=True)
    ordered = source[order]
    first = torch.searchsorted(ordered, ordered)
    ranks = torch.empty_like(source)
    ranks[order] = torch.arange(len(source)) - first
    return ranks
