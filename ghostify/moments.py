"""Streaming second moments: constant memory, additive over batches and processes; tensor maths only."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

ROWS = 8192


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over rows of features u (a values) and targets y (b values); float64, whatever the rows were.

    `uu` is a x a, `uy` is a x b, `yy` holds the b squares. Two sets of moments add up to the moments of all rows.
    """

    count: Tensor
    u: Tensor
    y: Tensor
    uu: Tensor
    uy: Tensor
    yy: Tensor

    @classmethod
    def zero(cls, features: int, targets: int) -> Moments:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        return cls(
            zeros(),
            zeros(features),
            zeros(targets),
            zeros(features, features),
            zeros(features, targets),
            zeros(targets),
        )

    def add(self, u: Tensor, y: Tensor) -> None:
        """Take up rows u (P x a) and y (P x b), in place. Products of blocks of rows are summed in float64."""
        for us, ys in zip(u.split(ROWS), y.split(ROWS), strict=True):
            self.count.add_(len(us))
            self.u.add_(us.sum(0, dtype=torch.float64))
            self.y.add_(ys.sum(0, dtype=torch.float64))
            self.uu.add_(us.T @ us)
            self.uy.add_(us.T @ ys)
            self.yy.add_(ys.square().sum(0, dtype=torch.float64))

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @cached_property
    def mean_u(self) -> Tensor:
        return self.u / self.count.clamp_min(1)

    @cached_property
    def mean_y(self) -> Tensor:
        return self.y / self.count.clamp_min(1)

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances (uu, uy) and variances (y) of the rows seen so far."""
        n = self.count.clamp_min(1)
        uu = self.uu / n - torch.outer(self.mean_u, self.mean_u)
        uy = self.uy / n - torch.outer(self.mean_u, self.mean_y)
        return uu, uy, (self.yy / n - self.mean_y.square()).clamp_min(0)

    def raw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean products (uu, uy) and squares (y), means included."""
        n = self.count.clamp_min(1)
        return self.uu / n, self.uy / n, self.yy / n


@dataclass(frozen=True, eq=False)
class MapMoments:
    """Sums over rows of n maps at D places and of n targets, map by map: no products between different maps.

    `auto` is n x D x D, `cross` D x n x n (place, map, target), `v` D x n; float64.
    """

    count: Tensor
    v: Tensor
    y: Tensor
    auto: Tensor
    cross: Tensor
    yy: Tensor

    @classmethod
    def zero(cls, maps: int, places: int) -> MapMoments:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        sums = zeros(), zeros(places, maps), zeros(maps)
        return cls(*sums, zeros(maps, places, places), zeros(places, maps, maps), zeros(maps))

    def add(self, v: Tensor, y: Tensor) -> None:
        """Take up rows v (P x D x n) and y (P x n), in place."""
        for vs, ys in zip(v.split(ROWS), y.split(ROWS), strict=True):
            self.count.add_(len(vs))
            self.v.add_(vs.sum(0, dtype=torch.float64))
            self.y.add_(ys.sum(0, dtype=torch.float64))
            by_map = vs.permute(2, 1, 0).contiguous()
            self.auto.add_(by_map @ by_map.mT)
            self.cross.add_((vs.flatten(1).T @ ys).reshape(self.cross.shape))
            self.yy.add_(ys.square().sum(0, dtype=torch.float64))

    def __add__(self, other: MapMoments) -> MapMoments:
        return MapMoments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))
