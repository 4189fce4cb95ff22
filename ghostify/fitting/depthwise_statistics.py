"""Layers with many maps (w = 1): who could be whose ghost, and the kernels once that is chosen; tensor maths only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ghostify.fitting.assignment import GhostAssignment
from ghostify.fitting.ghost_statistics import Solution
from ghostify.fitting.linear_solvers import damping_for, explained_variance, solve_damped
from ghostify.fitting.moments import AssignedMoments, PerMapMoments, rank_in_group


@dataclass(frozen=True, eq=False)
class PerMapStatistics:
    """Second moments of n maps, each with itself at the D places (`auto`, n x D x D) and with every output (`cross`,
    D x n x n), but none between two maps; `var`, `mean_v` (D x n) and `mean_y` likewise.
    """

    auto: Tensor
    cross: Tensor
    var: Tensor
    mean_v: Tensor
    mean_y: Tensor
    rows: float = float("inf")

    def pair_errors(self, weights: Tensor) -> Tensor:
        """Error of output j by the best kernel on map i, weighted by `weights` (n), for all pairs (n x n)."""
        return pair_errors(self.auto, self.cross.transpose(0, 1), self.var, self.rows) * weights

    def assigned(self, groups: GhostAssignment, basis: Tensor) -> AssignedStatistics:
        """What the chosen groups need of it; `basis` (n x c k^2) holds the filters that make the maps."""
        own, source = groups.intrinsic[:, 0], sources_of(groups)
        channels = groups.channels
        return AssignedStatistics(
            assignment=groups,
            auto=self.auto[own],
            cross=self.cross[:, own[source], channels].T,
            var=self.var,
            mean_v=self.mean_v[:, own].T,
            mean_y=self.mean_y[channels],
            basis=basis[own],
            rows=self.rows,
        )


def map_statistics(moments: PerMapMoments, free_mean: bool = True) -> PerMapStatistics:
    """Statistics from moments taken map by map, less the means where they are free."""
    n = moments.count.clamp_min(1)
    v, y = float(free_mean) * moments.v / n, float(free_mean) * moments.y / n
    return PerMapStatistics(
        auto=moments.auto / n - torch.einsum("di,ei->ide", v, v),
        cross=moments.cross / n - torch.einsum("di,j->dij", v, y),
        var=(moments.yy / n - y.square()).clamp_min(0),
        mean_v=v,
        mean_y=y,
        rows=float(moments.count),
    )


@dataclass(frozen=True, eq=False)
class AssignedStatistics:
    """Moments of each of m intrinsic maps with itself at the D places (`auto`, m x D x D), and of each computed channel
    with the map it is made of (`cross`, n x D); `mean_v` is m x D, `mean_y` (n) in computed, `var` in original order.

    `basis` (m x c k^2) holds the intrinsic filters, `bias` (m) their biases where the layer has any.
    """

    assignment: GhostAssignment
    auto: Tensor
    cross: Tensor
    var: Tensor
    mean_v: Tensor
    mean_y: Tensor
    basis: Tensor
    rows: float = float("inf")
    bias: Tensor | None = None

    @property
    def constant(self) -> bool:
        return self.bias is not None

    def kernels(self) -> Tensor:
        """The ghosts' kernels (ghosts x 1 x D) by the normal equations."""
        return solve_kernels(self.auto, self.cross[len(self.auto) :], self.assignment.sources[:, 0], self.rows)[:, None]

    def squared_errors(self, solution: Solution) -> Tensor:
        """See `GhostStatistics`."""
        each = self._all(solution.kernels)
        spent = torch.einsum("kd,kde,ke->k", each, self.auto[sources_of(self.assignment)], each)
        return (self.var - to_original_order(2 * (self.cross * each).sum(1) - spent, self.assignment)).clamp_min(0)

    def mean_residuals(self, solution: Solution) -> Tensor:
        """See `GhostStatistics`."""
        means = (self.mean_v[sources_of(self.assignment)] * self._all(solution.kernels)).sum(1)
        return to_original_order(self.mean_y - means, self.assignment)

    def _all(self, kernels: Tensor) -> Tensor:
        """The kernels of all computed channels (n x D): an intrinsic map's is 1 at the centre."""
        own = self.cross.new_zeros(len(self.auto), self.auto.shape[1])
        own[:, own.shape[1] // 2] = 1
        return torch.cat((own, kernels[:, 0]))


def assigned_statistics(
    moments: AssignedMoments, groups: GhostAssignment, basis: Tensor, bias: Tensor | None, free_mean: bool
) -> AssignedStatistics:
    """Statistics from moments taken link by link, less the means where they are free."""
    auto, cross, var, v, y = _centred(moments, sources_of(groups), free_mean)
    return AssignedStatistics(
        assignment=groups,
        auto=auto,
        cross=cross,
        var=to_original_order(var.clamp_min(0), groups),
        mean_v=v,
        mean_y=y,
        basis=basis,
        rows=float(moments.count),
        bias=bias,
    )


def _centred(moments: AssignedMoments, source: Tensor, free_mean: bool) -> tuple[Tensor, ...]:
    """Mean products (`auto`, `cross`, `var`), less the means where they are free; means of maps and targets."""
    n = moments.count.clamp_min(1)
    v, y = float(free_mean) * moments.v / n, float(free_mean) * moments.y / n
    auto = moments.auto / n - torch.einsum("id,ie->ide", v, v)
    return auto, moments.cross / n - v[source] * y[:, None], moments.yy / n - y.square(), v, y


def pair_errors(auto: Tensor, cross: Tensor, var: Tensor, rows: float) -> Tensor:
    """Squared error of output j by the best kernel on map i (n x n); `auto` is n x D x D, `cross` n x D x n."""
    return (var - explained_variance(auto, cross, damping_for(auto, rows))).clamp_min(0)


def sources_of(groups: GhostAssignment) -> Tensor:
    """For every computed channel the number of the intrinsic map it is made of; an intrinsic one's is its own."""
    return torch.cat((torch.arange(len(groups.intrinsic)), groups.sources[:, 0]))


def to_original_order(computed: Tensor, groups: GhostAssignment) -> Tensor:
    """Values of the computed channels, by original channel."""
    result = torch.empty_like(computed)
    result[groups.channels] = computed
    return result


def solve_kernels(auto: Tensor, cross: Tensor, source: Tensor, rows: float) -> Tensor:
    """Kernels (k x D) that make each target of its source among m maps; `auto` is m x D x D, `cross` k x D."""
    turns = rank_in_group(source)
    right = cross.new_zeros(*auto.shape[:2], int(turns.max()) + 1)
    right[source, :, turns] = cross
    return solve_damped(auto, right, damping_for(auto, rows))[source, :, turns]


def fit_assigned_kernels(moments: AssignedMoments, source: Tensor, free_mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of targets that are each made of one map: kernels (k x D), constants and relative errors (k)."""
    auto, cross, var, v, y = _centred(moments, source, free_mean)
    kernels = solve_kernels(auto, cross, source, float(moments.count))
    spent = torch.einsum("kd,kde,ke->k", kernels, auto[source], kernels)
    var = var.clamp_min(1e-30)
    error = var - 2 * (cross * kernels).sum(1) + spent
    return kernels, y - (v[source] * kernels).sum(1), error.clamp_min(0) / var
