"""Statistics and kernels of depthwise ghosts (w = 1) for layers with many maps; tensor maths only."""

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
    """Second moments of n maps at the D taps of the cheap kernel, without products of different maps.

    `auto` (n x D x D) holds those of each map with itself, `cross` (D x n x n) those with every output; `var`, `mean_v`
    (D x n) and `mean_y` as in `JointStatistics`. `rows` is the number of rows they come from.
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

    def assigned(self, assignment: GhostAssignment, basis: Tensor) -> AssignedStatistics:
        """The statistics of an assignment; `basis` (n x c k^2) holds the filters that compute the maps."""
        intrinsic, source = assignment.intrinsic[:, 0], sources_of(assignment)
        channels = assignment.channels
        return AssignedStatistics(
            assignment=assignment,
            auto=self.auto[intrinsic],
            cross=self.cross[:, intrinsic[source], channels].T,
            var=self.var,
            mean_v=self.mean_v[:, intrinsic].T,
            mean_y=self.mean_y[channels],
            basis=basis[intrinsic],
            rows=self.rows,
        )


def map_statistics(moments: PerMapMoments, free_mean: bool = True) -> PerMapStatistics:
    """Statistics from moments of single maps, less the means where they are free."""
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
    """Second moments of m intrinsic maps at the D taps of the cheap kernel, and of the outputs with their sources.

    `auto` (m x D x D) holds those of each map with itself, `cross` (n x D) those of each computed channel with its
    source map; `mean_v` is m x D, `mean_y` (n) in computed order, `var` (n) in original order. `basis` (m x c k^2)
    holds the intrinsic filters, `bias` (m) their biases where the layer has any.
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

    @property
    def mean_square(self) -> Tensor:
        """See `GhostStatistics`."""
        return self.var + to_original_order(self.mean_y.square(), self.assignment)

    def kernels(self) -> Tensor:
        """Kernels of the ghosts (ghosts x 1 x D) by the normal equations."""
        return solve_kernels(self.auto, self.cross[len(self.auto) :], self.assignment.sources[:, 0], self.rows)[:, None]

    def squared_errors(self, solution: Solution) -> Tensor:
        """See `GhostStatistics`."""
        kernels = self._all_kernels(solution.kernels)
        power = torch.einsum("kd,kde,ke->k", kernels, self.auto[sources_of(self.assignment)], kernels)
        return (self.var - to_original_order(2 * (self.cross * kernels).sum(1) - power, self.assignment)).clamp_min(0)

    def mean_residuals(self, solution: Solution) -> Tensor:
        """See `GhostStatistics`."""
        means = (self.mean_v[sources_of(self.assignment)] * self._all_kernels(solution.kernels)).sum(1)
        return to_original_order(self.mean_y - means, self.assignment)

    def _all_kernels(self, kernels: Tensor) -> Tensor:
        """Kernels of all computed channels (n x D): that of an intrinsic map is 1 at the centre."""
        identity = self.cross.new_zeros(len(self.auto), self.auto.shape[1])
        identity[:, identity.shape[1] // 2] = 1
        return torch.cat((identity, kernels[:, 0]))


def assigned_statistics(
    moments: AssignedMoments, assignment: GhostAssignment, basis: Tensor, bias: Tensor | None, free_mean: bool
) -> AssignedStatistics:
    """Statistics from moments of an assignment, less the means where they are free."""
    auto, cross, var, v, y = _centred(moments, sources_of(assignment), free_mean)
    return AssignedStatistics(
        assignment=assignment,
        auto=auto,
        cross=cross,
        var=to_original_order(var.clamp_min(0), assignment),
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


def sources_of(assignment: GhostAssignment) -> Tensor:
    """The index of the source map of every computed channel (n); the source of an intrinsic map is the map itself."""
    return torch.cat((torch.arange(len(assignment.intrinsic)), assignment.sources[:, 0]))


def to_original_order(computed: Tensor, assignment: GhostAssignment) -> Tensor:
    """Values of the computed channels, sorted by original channel."""
    result = torch.empty_like(computed)
    result[assignment.channels] = computed
    return result


def solve_kernels(auto: Tensor, cross: Tensor, source: Tensor, rows: float) -> Tensor:
    """Kernels (k x D) that predict each target from its source among m maps; `auto` is m x D x D, `cross` k x D."""
    ranks = rank_in_group(source)
    right = cross.new_zeros(*auto.shape[:2], int(ranks.max()) + 1)
    right[source, :, ranks] = cross
    return solve_damped(auto, right, damping_for(auto, rows))[source, :, ranks]


def fit_assigned_kernels(moments: AssignedMoments, source: Tensor, free_mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels (k x D), constants and squared errors (k) of targets that are each predicted from one map."""
    auto, cross, var, v, y = _centred(moments, source, free_mean)
    kernels = solve_kernels(auto, cross, source, float(moments.count))
    power = torch.einsum("kd,kde,ke->k", kernels, auto[source], kernels)
    error = (var - 2 * (cross * kernels).sum(1) + power).clamp_min(0)
    return kernels, y - (v[source] * kernels).sum(1), error
