"""What a simulated model computes in place of a convolution's outputs; tensor maths only.

Pruned inputs are predicted from the kept ones, x ~ A' x_kept + c, and the filters absorb the prediction. Outputs in a
ghost layout are the best approximation of that form: on a space of fewer directions, or by kernels on assigned maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghostify.fitting.assignment import GhostAssignment
from ghostify.fitting.depthwise_statistics import fit_assigned_kernels
from ghostify.fitting.linear_solvers import cholesky_root, damping_for, solve_damped
from ghostify.fitting.moments import AssignedMoments, Moments
from ghostify.pruning.slicing import slice_conv


def covariance_of(moments: Moments, *, free_mean: bool) -> Tensor:
    """The covariance of the features (n x n), or their mean products without a free mean."""
    return (moments.centred() if free_mean else moments.raw())[0]


@torch.no_grad()
def without_pruned_inputs(
    conv: nn.Conv2d, kept: Sequence[int], inputs: Moments, *, free_mean: bool, width: int = 1
) -> nn.Conv2d:
    """A convolution of the `kept` inputs whose filters absorb the prediction of the others.

    `inputs` are moments of all channels, each of which is `width` consecutive inputs. The constants of the prediction
    go to a bias, where the means are free.
    """
    channels = sorted({k // width for k in kept})
    index = torch.tensor(channels)
    predictors = predictors_from(channels, covariance_of(inputs, free_mean=free_mean), float(inputs.count))
    sliced = slice_conv(conv, None, kept)
    filters = conv.weight.double().cpu().unflatten(1, (-1, width)).flatten(2, 3)
    absorbed = torch.einsum("oikl,ji->ojkl", filters, predictors)
    sliced.weight.copy_(absorbed.reshape(sliced.weight.shape))
    if free_mean:
        constants = inputs.mean_u - inputs.mean_u[index] @ predictors
        bias = torch.einsum("oikl,i->o", filters, constants).to(conv.weight)
        sliced.bias = nn.Parameter(bias if conv.bias is None else conv.bias + bias)
    return sliced


def predictors_from(kept: Sequence[int], covariance: Tensor, rows: float) -> Tensor:
    """The least-squares coefficients (kept x n) that predict all maps from the `kept` ones."""
    index = torch.tensor(kept)
    of_kept = covariance[index][:, index]
    return solve_damped(of_kept, covariance[index], damping_for(of_kept, rows))


@dataclass(frozen=True, eq=False)
class LinearMaps:
    """Maps W y + b at every position, from maps y: `weight` is n x n, `constant` n."""

    weight: Tensor
    constant: Tensor

    def __call__(self, maps: Tensor) -> Tensor:
        return F.conv2d(maps, self.weight.to(maps)[:, :, None, None], self.constant.to(maps))


def on_best_directions(outputs: Moments, metric: Tensor, rank: int, *, free_mean: bool) -> LinearMaps:
    """The projection of the outputs (n) on the `rank` directions that lose the least under `metric` (n x n)."""
    covariance = covariance_of(outputs, free_mean=free_mean)
    return _around_mean(_projection(covariance, metric, rank), outputs.mean_u, free_mean=free_mean)


def on_directions_within_groups(
    outputs: Moments, metric: Tensor, groups: GhostAssignment, *, free_mean: bool
) -> LinearMaps:
    """The outputs projected group by group, on as many directions as the group has intrinsic maps."""
    covariance = covariance_of(outputs, free_mean=free_mean)
    weight = torch.zeros_like(covariance)
    for members in groups.members():
        block = members[:, None], members
        weight[block] = _projection(covariance[block], metric[block], groups.intrinsic.shape[1])
    return _around_mean(weight, outputs.mean_u, free_mean=free_mean)


def _projection(covariance: Tensor, metric: Tensor, rank: int) -> Tensor:
    root = cholesky_root(metric)
    directions = torch.linalg.eigh(root.T @ covariance @ root).eigenvectors[:, len(root) - rank :]
    return torch.linalg.solve_triangular(root.T, directions, upper=True) @ (root @ directions).T


def _around_mean(weight: Tensor, mean: Tensor, *, free_mean: bool) -> LinearMaps:
    return LinearMaps(weight, (mean - weight @ mean) * free_mean)


@dataclass(frozen=True, eq=False)
class KeptMaps:
    """Maps of which those `kept` (k) are replaced by `maps`; the change enters the other maps, which are predicted from
    them by `predictors` (k x n)."""

    kept: tuple[int, ...]
    maps: LinearMaps
    predictors: Tensor

    def __call__(self, maps: Tensor) -> Tensor:
        kept = maps[:, list(self.kept)]
        return maps + F.conv2d(self.maps(kept) - kept, self.predictors.T.to(maps)[:, :, None, None])


@dataclass(frozen=True, eq=False)
class DepthwiseGhosts:
    """Ghosts computed from their assigned maps; `kernels` (ghosts x D) and `constants` (ghosts) are of the ghosts."""

    assignment: GhostAssignment
    kernels: Tensor
    constants: Tensor

    def __call__(self, maps: Tensor) -> Tensor:
        sources = self.assignment.intrinsic[self.assignment.sources[:, 0], 0]
        count, taps = self.kernels.shape
        size = round(taps**0.5)
        kernels = self.kernels.reshape(count, 1, size, size).to(maps)
        read = maps[:, sources.to(maps.device)]
        replaced = maps.clone()
        ghosts = F.conv2d(read, kernels, self.constants.to(maps), padding=size // 2, groups=count)
        replaced[:, self.assignment.ghosts.to(maps.device)] = ghosts
        return replaced


def depthwise_ghosts(moments: AssignedMoments, assignment: GhostAssignment, *, free_mean: bool) -> DepthwiseGhosts:
    """The ghosts of an assignment with least-squares kernels; the targets of `moments` are the ghosts."""
    kernels, constants, _ = fit_assigned_kernels(moments, assignment.sources[:, 0], free_mean)
    return DepthwiseGhosts(assignment, kernels, constants * free_mean)
