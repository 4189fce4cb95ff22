"""The predicted error of the model's outputs that ghost layouts of a convolution add."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import assert_never

from ghostify.errors import GhostifyError
from ghostify.fitting.assignment import GhostAssignment, assign_ghosts
from ghostify.fitting.linear_solvers import cholesky_root
from ghostify.modules.layout import Depthwise, GhostLayout, Grouped, Pointwise
from ghostify.search.halves import mean_across_halves
from ghostify.search.layer_statistics import LayerStatistics


class LossEstimator:
    """Predicts the error of the model's outputs that layouts of one convolution add; depthwise and grouped ghosts have
    pair statistics for kernels of `dw_size` only."""

    def __init__(self, statistics: LayerStatistics, dw_size: int) -> None:
        self.statistics, self.dw_size = statistics, dw_size
        self._losses: dict[GhostLayout, float] = {}
        self._assignments: dict[GhostLayout, GhostAssignment] = {}

    def of(self, layout: GhostLayout) -> float:
        """The predicted error: of the best directions for pointwise ghosts, of the assigned pairs for depthwise ghosts;
        for grouped ghosts an upper bound, see `_within_groups`.

        Raises `GhostifyError` for a kernel size without pair statistics.
        """
        if layout not in self._losses:
            self._losses[layout] = self._predict(layout)
        return self._losses[layout]

    def _predict(self, layout: GhostLayout) -> float:
        match layout.form:
            case Pointwise():
                return float(self._truncation_losses[layout.ghosts])
            case Depthwise(d):
                assignment = self.assignment(layout)
                if assignment is None:
                    return float(self._truncation_losses[layout.ghosts])
                return assignment.total(self._pairs(d))
            case Grouped(_, d):
                assignment = self.assignment(layout)
                assert assignment is not None
                return self._within_groups(assignment, d)
            case _:
                assert_never(layout.form)

    def assignment(self, layout: GhostLayout) -> GhostAssignment | None:
        """The intrinsic maps and their ghosts; None where every ghost reads all intrinsic maps.

        Raises `GhostifyError` for a kernel size without pair statistics.
        """
        if layout.is_low_rank and not self._has_pairs(layout.kernel_size):
            return None
        if layout not in self._assignments:
            self._assignments[layout] = assign_ghosts(self._pairs(layout.kernel_size), layout)
        return self._assignments[layout]

    def lower_bound(self, layout: GhostLayout) -> float:
        """At most the predicted error. It is quicker for depthwise ghosts: as if every map could be a source, and the
        ghosts were the maps with the smallest errors."""
        match layout.form:
            case Depthwise(d) if self._has_pairs(d):
                return float(self._smallest_pair_errors[: layout.ghosts].sum())
            case Depthwise() | Grouped() | Pointwise():
                return self.of(layout)
            case _:
                assert_never(layout.form)

    def _within_groups(self, groups: GhostAssignment, kernel_size: int) -> float:
        """The error of the best directions within each group, as if kernels had one pixel; groups add up.

        A larger kernel has that pixel at its centre, so its ghosts have at most that error: an upper bound for the fit
        under a diagonal metric, and the error of the fit itself for kernels of one pixel. Larger kernels are fitted
        ghost by ghost, so only the metric's diagonal counts for them here; where the metric is far from diagonal, the
        error of the fit, which chooses directions by the whole metric, can exceed the bound.
        """
        statistics, width = self.statistics, groups.intrinsic.shape[1]
        if kernel_size > 1:
            statistics = replace(statistics, metric=torch.diag(statistics.metric.diagonal()))
        return sum(
            float(truncation_losses(statistics.among(members))[len(members) - width]) for members in groups.members()
        )

    def _has_pairs(self, kernel_size: int) -> bool:
        return kernel_size == self.dw_size and self.statistics.maps is not None

    def _pairs(self, kernel_size: int) -> Tensor:
        if not self._has_pairs(kernel_size):
            raise GhostifyError(
                f"kernel size {kernel_size}: no pair statistics. Compute layer statistics for this kernel size."
            )
        return self._pair_errors

    @cached_property
    def _truncation_losses(self) -> Tensor:
        return truncation_losses(self.statistics)

    @cached_property
    def _pair_errors(self) -> Tensor:
        assert self.statistics.maps is not None
        return self.statistics.maps.pair_errors(self.statistics.metric.diagonal())

    @cached_property
    def _smallest_pair_errors(self) -> Tensor:
        """For each map the smallest error as a ghost of another map, sorted."""
        others = self._pair_errors.clone().fill_diagonal_(float("inf"))
        return others.amin(0).sort().values


def truncation_losses(statistics: LayerStatistics) -> Tensor:
    """Weighted error of the best n - k directions for the outputs, for k = 0 ... n omitted: the sum of the k smallest
    eigenvalues. Directions of one half of the images are tested on the other half, since the error on the same images
    is too small where there are few."""
    root = cholesky_root(statistics.metric)

    def errors(fitted: Tensor, tested: Tensor) -> Tensor:
        vectors = torch.linalg.eigh(fitted).eigenvectors
        return ((vectors.T @ tested) * vectors.T).sum(1).clamp_min(0)

    omitted = mean_across_halves([root.T @ c @ root for c in statistics.covariances], errors)
    return torch.cat((torch.zeros(1, dtype=omitted.dtype), omitted.cumsum(0)))
