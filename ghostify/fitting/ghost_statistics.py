"""The statistics that the fit of a ghost module needs, and its solution; tensors only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ghostify.fitting.assignment import GhostAssignment


@dataclass(frozen=True, eq=False)
class Solution:
    """Coordinates of the intrinsic maps in the basis (m x b), and kernels (ghosts x w x D) of the assigned ghosts."""

    assignment: GhostAssignment
    intrinsic: Tensor
    kernels: Tensor


class GhostStatistics(Protocol):
    """Second moments of a layer's basis maps, at the D taps of the cheap kernel, with its n outputs."""

    @property
    def basis(self) -> Tensor:
        """The filters that compute the basis maps (b x c k^2)."""

    @property
    def var(self) -> Tensor:
        """The variance of each output (n, original order)."""

    @property
    def mean_square(self) -> Tensor:
        """The mean square of each output (n, original order)."""

    @property
    def constant(self) -> bool:
        """Whether the last coordinate of a solution multiplies a map that is 1 inside the image, 0 in the padding."""

    def squared_errors(self, solution: Solution) -> Tensor:
        """Squared error of every output (n, original order), after a free constant if the moments are centred."""

    def mean_residuals(self, solution: Solution) -> Tensor:
        """The mean of every output (n, original order) less that of its prediction."""
