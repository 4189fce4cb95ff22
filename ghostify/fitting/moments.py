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

ROWS = 8192
SMALL_CHUNK_ROWS = 1024
TILE_ROWS = 512


@dataclass(frozen=True, eq=False)
class TargetSums:
    """Sums over rows with n targets: `count` rows, the targets `y` and their squares `yy` (n); float64.

    What else is summed, subclasses say. Two sets of sums add up to those of all rows.
    """

    count: Tensor
    y: Tensor
    yy: Tensor

    def take_targets(self, y: Tensor) -> None:
        """Take up the targets of rows (P x n), in place."""
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

    Of the products of u with itself (a x a) `upper` is good above the diagonal only; `uy` is a x n.
    """

    u: Tensor
    upper: Tensor
    uy: Tensor

    @classmethod
    def zero(cls, features: int, targets: int) -> Moments:
        own = zeros(features), zeros(features, features), zeros(features, targets)
        return cls(zeros(), zeros(targets), zeros(targets), *own)

    def add(self, u: Tensor, y: Tensor) -> None:
        """Take up rows u (P x a) and y (P x n), in place. Products of blocks of rows are summed in float64."""
        for us, ys in zip(u.split(ROWS), y.split(ROWS), strict=True):
            self.take_targets(ys)
            self.u.add_(us.sum(0, dtype=torch.float64))
            for a in range(0, us.shape[1], TILE_ROWS):
                self.upper[a : a + TILE_ROWS, a:].add_(us[:, a : a + TILE_ROWS].T @ us[:, a:])
            self.uy.add_(us.T @ ys)

    @property
    def uu(self) -> Tensor:
        whole = self.upper.clone()
        for a in range(0, len(whole), TILE_ROWS):
            b = min(a + TILE_ROWS, len(whole))
            whole[a:b, a:b] = whole[a:b, a:b].triu() + whole[a:b, a:b].triu(1).T
            whole[b:, a:b] = whole[a:b, b:].T
        return whole

    def projected(self, basis: Tensor) -> Moments:
        """Moments of maps that are `basis` (b x a) times the features."""
        return replace(self, u=basis @ self.u, upper=basis @ self.uu @ basis.T, uy=basis @ self.uy)

    @cached_property
    def mean_u(self) -> Tensor:
        return self.u / self.count.clamp_min(1)

    @cached_property
    def mean_y(self) -> Tensor:
        return self.y / self.count.clamp_min(1)

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances (uu, uy) and variances (y) of the rows seen so far."""
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
    """Moments of the rows that are fitted to, and of those that only judge."""

    fitted: Moments
    holdout: Moments

    @classmethod
    def zero(cls, features: int, targets: int) -> SplitMoments:
        return cls(Moments.zero(features, targets), Moments.zero(features, targets))

    def add(self, u: Tensor, y: Tensor, judges: Tensor) -> None:
        """Take up rows; `judges` (P, bool) says which of them are held out."""
        self.fitted.add(u[~judges], y[~judges])
        self.holdout.add(u[judges], y[judges])

    def all_reduced(self) -> SplitMoments:
        return SplitMoments(self.fitted.all_reduced(), self.holdout.all_reduced())

    @cached_property
    def both(self) -> Moments:
        return self.fitted + self.holdout


@dataclass(frozen=True, eq=False)
class PerMapMoments(TargetSums):
    """Sums of n maps at D places and of n targets, map by map: no products between different maps.

    `v` is D x n, `auto` n x D x D, `cross` D x n x n (place, map, target).
    """

    v: Tensor
    auto: Tensor
    cross: Tensor

    @classmethod
    def zero(cls, maps: int, places: int) -> PerMapMoments:
        own = zeros(places, maps), zeros(maps, places, places), zeros(places, maps, maps)
        return cls(zeros(), zeros(maps), zeros(maps), *own)

    def add(self, v: Tensor, y: Tensor) -> None:
        """Take up rows v (P x D x n) and y (P x n), in place."""
        for vs, ys in zip(v.split(ROWS), y.split(ROWS), strict=True):
            self.take_targets(ys)
            by_map = vs.permute(2, 1, 0).contiguous()
            self.v.add_(vs.sum(0, dtype=torch.float64))
            self.auto.add_(by_map @ by_map.mT)
            self.cross.add_((vs.flatten(1).T @ ys).reshape(self.cross.shape))


@dataclass(frozen=True, eq=False)
class AssignedMoments(TargetSums):
    """Sums of m maps at D places and of n targets, each of which is linked to one map.

    `v` is m x D, `auto` m x D x D, `cross` n x D.
    """

    v: Tensor
    auto: Tensor
    cross: Tensor

    @classmethod
    def zero(cls, maps: int, places: int, targets: int) -> AssignedMoments:
        own = zeros(maps, places), zeros(maps, places, places), zeros(targets, places)
        return cls(zeros(), zeros(targets), zeros(targets), *own)

    def add(self, v: Tensor, y: Tensor, source: Tensor) -> None:
        """Take up rows v (P x D x m) and y (P x n), in place; `source` (n) names each target's map."""
        turns = rank_in_group(source)
        for vs, ys in zip(v.split(SMALL_CHUNK_ROWS), y.split(SMALL_CHUNK_ROWS), strict=True):
            self.take_targets(ys)
            by_map = vs.permute(2, 1, 0).contiguous()
            served = by_map.new_zeros(int(turns.max()) + 1, len(by_map), len(ys))
            served[turns, source] = ys.T
            self.v.add_(by_map.sum(2, dtype=torch.float64))
            self.auto.add_(by_map @ by_map.mT)
            self.cross.add_((by_map @ served.permute(1, 2, 0))[source, :, turns])


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def rank_in_group(source: Tensor) -> Tensor:
    """For every ghost how many ghosts of the same intrinsic map stand before it."""
    order = source.argsort(stable=True)
    ranked = source[order]
    first = torch.searchsorted(ranked, ranked)
    turns = torch.empty_like(source)
    turns[order] = torch.arange(len(source)) - first
    return turns
