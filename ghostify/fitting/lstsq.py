"""Moments -> weights: dense prediction, kernels, joint refit; tensor maths only, no modules, no graphs.

Notation of docs/explanation/fitting.md: a layer's outputs y (n channels) are predicted from a basis v (b maps) seen at
the D = d x d places of the cheap kernel. Intrinsic map i is a_i' v at the centre; ghost j is the sum over its w
intrinsic maps of their values at the D places times K_j, plus a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from scipy.linalg import qr
from torch import Tensor
from typing_extensions import assert_never

from ghostify.fitting.assignment import GhostAssignment, assign_ghosts
from ghostify.fitting.depthwise_statistics import AssignedStatistics, pair_errors, to_original_order
from ghostify.fitting.ghost_statistics import Solution
from ghostify.fitting.linear_solvers import cholesky_root, damping_for, solve_damped, solve_ridge
from ghostify.fitting.moments import Moments, SplitMoments, rank_in_group
from ghostify.modules.layout import Depthwise, GhostLayout, Grouped, Pointwise

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DEFAULT_RIDGE = 0.1
AMPLE = 16
MAX_HOLDOUT_OUTPUTS = 64
JOINT_STEPS = 10
JOINT_STOP = 1e-2


@dataclass(frozen=True, eq=False)
class JointStatistics:
    """Second moments of a basis of maps at the places of the cheap kernel, and with the layer's outputs.

    `gram` is D x b x D x b and `cross` D x b x n, centred unless the outputs may take no constant; `var`, `mean_v` (D x
    b) and `mean_y` likewise. `basis` (b x c k^2) holds the filters that make the basis maps, `initial_coordinates` (n x
    b) the dense prediction of the outputs in it. `rows` were seen; few of them make the solutions more cautious. With
    `constant`, the last basis map is 1 inside the image, 0 in the padding.
    """

    gram: Tensor
    cross: Tensor
    var: Tensor
    mean_v: Tensor
    mean_y: Tensor
    basis: Tensor
    initial_coordinates: Tensor
    rows: float = float("inf")
    constant: bool = False

    @property
    def centre(self) -> int:
        return self.gram.shape[0] // 2

    def squared_errors(self, solution: Solution) -> Tensor:
        """See `GhostStatistics`."""
        groups, centre, m = solution.groups, self.centre, len(solution.intrinsic)
        own, ghosts = groups.channels[:m], groups.channels[m:]
        kept = _loss(solution.intrinsic, self.gram[centre, :, centre], self.cross[centre][:, own], self.var[own])
        size = self.gram.shape[0] * self.gram.shape[1]
        gram, cross = self.gram.reshape(size, size), self.cross.reshape(size, -1)[:, ghosts]
        made = _loss(_ghost_maps(solution).flatten(1), gram, cross, self.var[ghosts])
        return to_original_order(torch.cat((kept, made)), groups).clamp_min(0)

    def mean_residuals(self, solution: Solution) -> Tensor:
        """See `GhostStatistics`."""
        own = (solution.intrinsic * self.mean_v[self.centre]).sum(1)
        means = torch.cat((own, (_ghost_maps(solution) * self.mean_v).sum((1, 2))))
        return self.mean_y - to_original_order(means, solution.groups)


def statistics(
    moments: Moments, places: int, basis: Tensor, initial_coordinates: Tensor, constant: bool, free_mean: bool
) -> JointStatistics:
    """Statistics from the moments of a basis at `places` places (features ordered place by place) and the outputs."""
    gram, cross, var = moments.centred() if free_mean else moments.raw()
    size, free = len(gram) // places, float(free_mean)
    return JointStatistics(
        gram=gram.reshape(places, size, places, size),
        cross=cross.reshape(places, size, -1),
        var=var,
        mean_v=free * moments.mean_u.reshape(places, size),
        mean_y=free * moments.mean_y,
        basis=basis,
        initial_coordinates=initial_coordinates,
        rows=float(moments.count),
        constant=constant,
    )


def refit_filters(moments: SplitMoments, prior: Tensor, weights: Tensor, *, free_mean: bool) -> Tensor:
    """The filters (c k^2 x n) that best predict the outputs from the layer's present inputs.

    The ridge pulls towards the original filters `prior`; it is chosen on `held_out` (by `weights`, n), then all rows
    are used. Without held-out rows it is `DEFAULT_RIDGE`. With `free_mean` a constant per output is free.
    """

    def parts(moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
        return moments.centred() if free_mean else moments.raw()

    ridge = DEFAULT_RIDGE
    if moments.holdout.count:
        initial_coordinates = RIDGES[2] if moments.fitted.count > AMPLE * len(prior) else RIDGES[3]
        ridge = best_ridge(parts(moments.fitted), parts(moments.holdout), prior, weights, initial_coordinates)
    uu, uy, _ = parts(moments.both)
    return solve_ridge(uu, uy, prior, ridge)


def best_ridge(
    fit: tuple[Tensor, ...], held_out: tuple[Tensor, ...], prior: Tensor, weights: Tensor, initial_coordinates: float
) -> float:
    """Of `RIDGES` the one that does best on `held_out`, judged by some outputs, going downhill from
    `initial_coordinates`."""
    some = torch.arange(0, prior.shape[1], -(-prior.shape[1] // MAX_HOLDOUT_OUTPUTS))
    dtype = torch.float32 if len(prior) > MAX_HOLDOUT_OUTPUTS else prior.dtype
    uu, uy, prior = fit[0].to(dtype), fit[1][:, some].to(dtype), prior[:, some].to(dtype)
    test_uu, test_uy, weights = held_out[0].to(dtype), held_out[1][:, some].to(dtype), weights[some].to(dtype)

    @cache
    def loss(k: int) -> float:
        if not 0 <= k < len(RIDGES):
            return float("inf")
        filters = solve_ridge(uu, uy, prior, RIDGES[k])
        gain = 2 * (filters * test_uy).sum(0) - (filters * (test_uu @ filters)).sum(0)
        return -(weights * gain).sum().item()

    k = RIDGES.index(initial_coordinates)
    step = 1 if loss(k + 1) < loss(k) else -1
    while loss(k + step) < loss(k):
        k += step
    return RIDGES[k]


def solve_ghosts(
    stats: JointStatistics | AssignedStatistics, layout: GhostLayout, metric: Tensor, method: FitMethod | None = None
) -> Solution:
    """The ghost layer of `layout` that predicts the outputs with the least error e' M e by the `metric` M (n x n).

    Grouping by pair errors, kernels by the normal equations; for w = 1 then the joint refit by alternating half-steps,
    for wider ghosts with one-pixel kernels the optimum in closed form (reduced rank within each group), which alone
    knows how errors of different channels count together: the rest goes by M's diagonal. `AssignedStatistics` stand for
    w = 1 with groups that are chosen already, and without a joint refit.
    """
    if isinstance(stats, AssignedStatistics):
        return _of_links(stats)
    method, weights = method or DEFAULT_METHOD, metric.diagonal()
    groups = method.assign_ghosts(pair_costs(stats, weights), layout)
    match layout.form:
        case Depthwise():
            first = _with_kernels(stats, groups, stats.initial_coordinates[groups.intrinsic.flatten()])
            return method.refit_jointly(stats, first, weights)
        case Grouped() | Pointwise():
            return _with_kernels(stats, *_reduced_rank(stats, groups, metric))
        case _:
            assert_never(layout.form)


def _of_links(links: AssignedStatistics) -> Solution:
    """The dense predictions of the chosen intrinsic maps as they are, and the kernels on them."""
    own = torch.eye(len(links.auto), dtype=torch.float64)
    initial_coordinates = own if links.bias is None else torch.cat((own, links.bias[:, None]), 1)
    return Solution(links.assignment, initial_coordinates, links.kernels())


def _loss(coordinates: Tensor, gram: Tensor, cross: Tensor, var: Tensor) -> Tensor:
    """Squared errors of predictions with these coordinates (k x b), given moments of the basis and the targets."""
    return var - 2 * (coordinates * cross.T).sum(1) + ((coordinates @ gram) * coordinates).sum(1)


def _ghost_maps(solution: Solution) -> Tensor:
    """Every ghost as coefficients over places and basis (ghosts x D x b)."""
    groups = solution.groups
    standing, kernels = _by_group(groups, solution.kernels)
    maps = solution.intrinsic.reshape(*groups.intrinsic.shape, -1)
    return torch.einsum("gtwd,gwb->gtdb", kernels, maps)[standing]


def pair_costs(stats: JointStatistics, weights: Tensor) -> Tensor:
    """Weighted error of predicting output j by the best kernel on the dense prediction of output i, for all pairs."""
    initial_coordinates = stats.initial_coordinates
    half = torch.einsum("ib,dbec->idec", initial_coordinates, stats.gram)
    gram = torch.einsum("idec,ic->ide", half, initial_coordinates)
    cross = torch.einsum("ib,dbj->idj", initial_coordinates, stats.cross)
    return pair_errors(gram, cross, stats.var, stats.rows) * weights


def _with_kernels(stats: JointStatistics, groups: GhostAssignment, coordinates: Tensor) -> Solution:
    """The kernels that fit the ghosts best, given the intrinsic maps: a system of w D unknowns for each group."""
    count, width = groups.intrinsic.shape
    places, size = stats.gram.shape[:2]
    standing, targets = _by_group(groups, groups.ghosts)  # where a group has fewer, what is found is left out
    step = max(1, 2**26 // (width * places * places * size))
    solved = []
    for a, mine in zip(coordinates.reshape(count, width, -1).split(step), targets.split(step), strict=True):
        half = torch.einsum("gwb,dbec->gwdec", a, stats.gram)
        gram = torch.einsum("gwdec,gvc->gwdve", half, a).reshape(len(a), width * places, width * places)
        right = torch.einsum("gwb,dbgt->gwdt", a, stats.cross[:, :, mine]).flatten(1, 2)
        solved.append(solve_damped(gram, right, damping_for(gram, stats.rows)))
    kernels = torch.cat(solved).transpose(1, 2)[standing]
    return Solution(groups, coordinates, kernels.reshape(len(kernels), width, places))


def _by_group(groups: GhostAssignment, values: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Values of the ghosts (ghosts x ...) as a table of groups x ghosts of each, and where in it they stand."""
    owner = groups.sources[:, 0] // groups.intrinsic.shape[1]
    turns = rank_in_group(owner)
    table = values.new_zeros(len(groups.intrinsic), int(turns.max()) + 1, *values.shape[1:])
    table[owner, turns] = values
    return (owner, turns), table


def _refit_jointly(stats: JointStatistics, solution: Solution, weights: Tensor) -> Solution:
    """Joint refit for w = 1: intrinsic coordinates and kernels by turns, each in closed form, while the error falls."""
    best, least = solution, (weights * stats.squared_errors(solution)).sum()
    for _ in range(JOINT_STEPS):
        solution = _with_kernels(stats, solution.groups, _with_coordinates(stats, best, weights))
        error = (weights * stats.squared_errors(solution)).sum()
        if error >= least:
            break
        best, fell, least = solution, (least - error) / least.clamp_min(1e-30), error
        if fell < JOINT_STOP:
            break
    return best


def _with_coordinates(stats: JointStatistics, solution: Solution, weights: Tensor) -> Tensor:
    """The intrinsic maps that serve themselves and their ghosts best, given the kernels (w = 1): m linear systems."""
    groups, (places, size) = solution.groups, stats.gram.shape[:2]
    mine = groups.intrinsic.flatten()
    owner = groups.sources[:, 0]
    kernels, ghost_weights = solution.kernels[:, 0], weights[groups.ghosts]
    own_gram, own_cross = _own_terms(stats)
    pairs = torch.zeros(len(mine), places * places, dtype=weights.dtype)
    pairs.index_add_(0, owner, ghost_weights[:, None] * torch.einsum("jd,je->jde", kernels, kernels).flatten(1))
    right = weights[mine, None] * own_cross[:, mine].T
    pull = torch.einsum("jd,dbj->jb", kernels, stats.cross[:, :, groups.ghosts])
    right = right.index_add(0, owner, ghost_weights[:, None] * pull)
    by_place = stats.gram.permute(0, 2, 1, 3).reshape(places * places, size * size)
    result = torch.empty_like(solution.intrinsic)
    step = max(1, 2**25 // size**2)
    for a in range(0, len(mine), step):
        b = min(a + step, len(mine))
        systems = (pairs[a:b] @ by_place).reshape(-1, size, size) + weights[mine[a:b], None, None] * own_gram
        damping = 10 * damping_for(systems, stats.rows)
        residual = right[a:b] - torch.einsum("ibc,ic->ib", systems, solution.intrinsic[a:b])
        result[a:b] = solution.intrinsic[a:b] + solve_damped(systems, residual[..., None], damping)[..., 0]
    return result


def _own_terms(stats: JointStatistics) -> tuple[Tensor, Tensor]:
    """Moments of an intrinsic map with its own target: where the bias is among the unknowns, the mean counts too."""
    gram, cross = stats.gram[stats.centre, :, stats.centre], stats.cross[stats.centre]
    if not stats.constant:
        return gram, cross
    mean = stats.mean_v[stats.centre]
    return gram + torch.outer(mean, mean), cross + torch.outer(mean, stats.mean_y)


def _reduced_rank(stats: JointStatistics, groups: GhostAssignment, metric: Tensor) -> tuple[GhostAssignment, Tensor]:
    """Within each group the w maps that serve all its outputs best (leading eigenvectors), as w of the outputs.

    Reduced-rank regression of L' y, with M = L L'. Any rank-w prediction A B with an invertible w x w block of A equals
    one whose w rows there are the identity, so that concatenation loses nothing against low rank. Pivoted QR finds a
    well-conditioned block.
    """
    centre = stats.centre
    gram = stats.gram[centre, :, centre]
    width = groups.intrinsic.shape[1]
    intrinsic, sources, ghosts, coordinates = [], [], [], []
    for g, members in enumerate(groups.members()):
        factor = cholesky_root(metric[members][:, members])
        prediction = factor.T @ stats.initial_coordinates[members]
        moment = prediction @ gram @ prediction.T
        vectors = torch.linalg.eigh((moment + moment.T) / 2).eigenvectors[:, -width:]
        loadings = torch.linalg.solve_triangular(factor.T, vectors, upper=True)
        rows = torch.from_numpy(qr(loadings.T.numpy(), mode="r", pivoting=True)[1][:width].copy()).long()
        coordinates.append(loadings[rows] @ (vectors.T @ prediction))
        others = torch.ones(len(members), dtype=torch.bool)
        others[rows] = False
        intrinsic.append(members[rows])
        ghosts.append(members[others])
        sources.append(torch.arange(g * width, (g + 1) * width).expand(int(others.sum()), width))
    chosen = replace(groups, intrinsic=torch.stack(intrinsic), ghosts=torch.cat(ghosts), sources=torch.cat(sources))
    return chosen, torch.cat(coordinates)


@dataclass(frozen=True)
class FitMethod:
    """The steps of a fit that can be replaced, in order to measure what each contributes.

    `refit_filters` has the signature of `refit_filters`, `assign_ghosts` takes errors of pairs (n x n) and a layout,
    `refit_jointly` takes statistics, a first solution and weights of the outputs (n).
    """

    refit_filters: Callable[..., Tensor] = refit_filters
    assign_ghosts: Callable[[Tensor, GhostLayout], GhostAssignment] = assign_ghosts
    refit_jointly: Callable[[JointStatistics, Solution, Tensor], Solution] = _refit_jointly


DEFAULT_METHOD = FitMethod()
