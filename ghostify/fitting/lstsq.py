"""Least squares of ghost modules: filter refit, kernels, joint refit; tensor maths only, no modules, no graphs.

Notation of docs/explanation/fitting.md: a layer's outputs y (n channels) are predicted from a basis v (b maps) at the
D = d x d taps of the cheap kernel. Intrinsic map i is a_i' v at the centre; ghost j is the sum over its w intrinsic
maps of their values at the D taps times K_j, plus a constant.
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
from ghostify.fitting.linear_solvers import best_share, cholesky_root, damping_for, solve_damped, solve_ridge
from ghostify.fitting.moments import Moments, SplitMoments, rank_in_group
from ghostify.fitting.row_sample import SplitRows, refit_on_rows
from ghostify.modules.layout import Depthwise, GhostLayout, Grouped, Pointwise

RELATIVE_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DEFAULT_RIDGE = 0.1
AMPLE_ROWS_PER_FEATURE = 16
MAX_HOLDOUT_OUTPUTS = 64
MAX_JOINT_STEPS = 10
MIN_JOINT_GAIN = 1e-2


@dataclass(frozen=True, eq=False)
class JointStatistics:
    """Second moments of a basis of maps at the taps of the cheap kernel, with each other and with the layer's outputs.

    `gram` is D x b x D x b and `cross` D x b x n. They are centred, as `var` (n), where the outputs have a free
    constant; `mean_v` (D x b) and `mean_y` (n) are then the means, else 0. `basis` (b x c k^2) holds the filters that
    compute the basis maps, `initial_coordinates` (n x b) the refitted maps in that basis. `rows` is the number of rows:
    the fewer, the larger the damping. With `constant`, the last basis map is 1 inside the image, 0 in the padding.
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

    @property
    def mean_square(self) -> Tensor:
        """See `GhostStatistics`."""
        return self.var + self.mean_y.square()

    def squared_errors(self, solution: Solution) -> Tensor:
        """See `GhostStatistics`."""
        assignment, centre, m = solution.assignment, self.centre, len(solution.intrinsic)
        intrinsic, ghosts = assignment.channels[:m], assignment.channels[m:]
        centre_gram, centre_cross = self.gram[centre, :, centre], self.cross[centre]
        intrinsic_errors = _squared_errors(
            solution.intrinsic, centre_gram, centre_cross[:, intrinsic], self.var[intrinsic]
        )
        size = self.gram.shape[0] * self.gram.shape[1]
        gram, cross = self.gram.reshape(size, size), self.cross.reshape(size, -1)[:, ghosts]
        ghost_errors = _squared_errors(_ghost_coordinates(solution).flatten(1), gram, cross, self.var[ghosts])
        return to_original_order(torch.cat((intrinsic_errors, ghost_errors)), assignment).clamp_min(0)

    def mean_residuals(self, solution: Solution) -> Tensor:
        """See `GhostStatistics`."""
        intrinsic_means = (solution.intrinsic * self.mean_v[self.centre]).sum(1)
        means = torch.cat((intrinsic_means, (_ghost_coordinates(solution) * self.mean_v).sum((1, 2))))
        return self.mean_y - to_original_order(means, solution.assignment)


def joint_statistics(
    moments: Moments, taps: int, basis: Tensor, initial_coordinates: Tensor, constant: bool, free_mean: bool
) -> JointStatistics:
    """Statistics from the moments of a basis at `taps` taps (features ordered tap by tap) and the outputs."""
    gram, cross, var = moments.centred() if free_mean else moments.raw()
    size, free = len(gram) // taps, float(free_mean)
    return JointStatistics(
        gram=gram.reshape(taps, size, taps, size),
        cross=cross.reshape(taps, size, -1),
        var=var,
        mean_v=free * moments.mean_u.reshape(taps, size),
        mean_y=free * moments.mean_y,
        basis=basis,
        initial_coordinates=initial_coordinates,
        rows=float(moments.count),
        constant=constant,
    )


def refit_filters(moments: SplitMoments | SplitRows, prior: Tensor, weights: Tensor, *, free_mean: bool) -> Tensor:
    """The filters (c k^2 x n) that best predict the outputs from the layer's present inputs, by ridge regression.

    The ridge shrinks towards `prior`, the filters for the original's inputs, and of the change a share is made. Both
    are those with the smallest error on the holdout, weighted by `weights` (n); the holdout is in no sum that is
    fitted. Without a holdout, all rows are fitted with `DEFAULT_RIDGE`. With `free_mean` a constant per output is free.
    """

    if isinstance(moments, SplitRows):
        return refit_on_rows(moments, prior, weights, RELATIVE_RIDGES, DEFAULT_RIDGE, free_mean=free_mean)

    def second_moments(moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
        return moments.centred() if free_mean else moments.raw()

    fitted = second_moments(moments.fitted_rows)
    if not moments.is_split:
        return solve_ridge(*fitted[:2], prior, DEFAULT_RIDGE)
    is_ample = moments.fitted.count > AMPLE_ROWS_PER_FEATURE * len(prior)
    initial_ridge = RELATIVE_RIDGES[2] if is_ample else RELATIVE_RIDGES[3]
    choice = best_ridge(fitted, second_moments(moments.holdout), prior, weights, initial_ridge)
    return prior + choice.share * (solve_ridge(*fitted[:2], prior, choice.ridge) - prior)


@dataclass(frozen=True)
class RidgeChoice:
    """A ridge relative to the mean diagonal of the moments, and the share of the resulting change that is made."""

    ridge: float
    share: float


def best_ridge(
    fitted: tuple[Tensor, ...], holdout: tuple[Tensor, ...], prior: Tensor, weights: Tensor, initial_ridge: float
) -> RidgeChoice:
    """The one of `RELATIVE_RIDGES` with the smallest error of some outputs on `holdout`, by descent from
    `initial_ridge`, each with its best share."""
    some = torch.arange(0, prior.shape[1], -(-prior.shape[1] // MAX_HOLDOUT_OUTPUTS))
    dtype = torch.float32 if len(prior) > MAX_HOLDOUT_OUTPUTS else prior.dtype
    uu, uy, prior = fitted[0].to(dtype), fitted[1][:, some].to(dtype), prior[:, some].to(dtype)
    holdout_uu, holdout_uy, weights = holdout[0].to(dtype), holdout[1][:, some].to(dtype), weights[some].to(dtype)

    holdout_residual = holdout_uy - holdout_uu @ prior

    @cache
    def choice(k: int) -> tuple[float, float]:
        """The change of the holdout error (half of it), and the share."""
        if not 0 <= k < len(RELATIVE_RIDGES):
            return float("inf"), 0.0
        change = solve_ridge(uu, uy, prior, RELATIVE_RIDGES[k]) - prior
        slope = float((weights * (change * holdout_residual).sum(0)).sum())
        curvature = float((weights * (change * (holdout_uu @ change)).sum(0)).sum())
        share = best_share(slope, curvature)
        return share * (share * curvature / 2 - slope), share

    def loss(k: int) -> float:
        return choice(k)[0]

    k = RELATIVE_RIDGES.index(initial_ridge)
    step = 1 if loss(k + 1) < loss(k) else -1
    while loss(k + step) < loss(k):
        k += step
    return RidgeChoice(RELATIVE_RIDGES[k], choice(k)[1])


def solve_ghosts(
    stats: JointStatistics | AssignedStatistics, layout: GhostLayout, metric: Tensor, method: FitMethod | None = None
) -> Solution:
    """The ghost layer of `layout` that predicts the outputs with the least error e' M e by the `metric` M (n x n).

    Assignment by pair errors, kernels by the normal equations. For w = 1 a joint refit by alternating half-steps
    follows. For wider ghosts with one-pixel kernels, the optimum in closed form (reduced rank within each group)
    replaces it; it uses the complete M, all other steps its diagonal. `AssignedStatistics` are for w = 1 with a given
    assignment, without a joint refit.
    """
    if isinstance(stats, AssignedStatistics):
        return _solve_assigned(stats)
    method, weights = method or DEFAULT_METHOD, metric.diagonal()
    assignment = method.assign_ghosts(pair_costs(stats, weights), layout)
    match layout.form:
        case Depthwise():
            initial = _with_kernels(stats, assignment, stats.initial_coordinates[assignment.intrinsic.flatten()])
            return method.refit_jointly(stats, initial, weights)
        case Grouped() | Pointwise():
            assignment, coordinates = _reduced_rank(stats, assignment, metric)
            return _with_kernels(stats, assignment, _with_own_means(stats, assignment, coordinates))
        case _:
            assert_never(layout.form)


def _solve_assigned(stats: AssignedStatistics) -> Solution:
    """The refitted maps of the intrinsic channels, unchanged, and the kernels on them."""
    identity = torch.eye(len(stats.auto), dtype=torch.float64)
    coordinates = identity if stats.bias is None else torch.cat((identity, stats.bias[:, None]), 1)
    return Solution(stats.assignment, coordinates, stats.kernels())


def _squared_errors(coordinates: Tensor, gram: Tensor, cross: Tensor, var: Tensor) -> Tensor:
    """Squared errors (k) of predictions with these coordinates (k x b), given moments of the basis and the targets."""
    return var - 2 * (coordinates * cross.T).sum(1) + ((coordinates @ gram) * coordinates).sum(1)


def _ghost_coordinates(solution: Solution) -> Tensor:
    """Coordinates of every ghost over taps and basis (ghosts x D x b)."""
    assignment = solution.assignment
    index, kernels = _by_group(assignment, solution.kernels)
    maps = solution.intrinsic.reshape(*assignment.intrinsic.shape, -1)
    return torch.einsum("gtwd,gwb->gtdb", kernels, maps)[index]


def pair_costs(stats: JointStatistics, weights: Tensor) -> Tensor:
    """Weighted error of output j by the best kernel on the refitted map of output i, for all pairs (n x n)."""
    initial_coordinates = stats.initial_coordinates
    half = torch.einsum("ib,dbec->idec", initial_coordinates, stats.gram)
    gram = torch.einsum("idec,ic->ide", half, initial_coordinates)
    cross = torch.einsum("ib,dbj->idj", initial_coordinates, stats.cross)
    return pair_errors(gram, cross, stats.var, stats.rows) * weights


def _with_own_means(stats: JointStatistics, assignment: GhostAssignment, coordinates: Tensor) -> Tensor:
    """Coordinates of the intrinsic maps, with the constants that give them the means of their own outputs."""
    if not stats.constant:
        return coordinates
    means = (coordinates * stats.mean_v[stats.centre]).sum(1)
    residuals = stats.mean_y[assignment.intrinsic.flatten()] - means
    return torch.cat((coordinates[:, :-1], coordinates[:, -1:] + residuals[:, None]), 1)


def _with_kernels(stats: JointStatistics, assignment: GhostAssignment, coordinates: Tensor) -> Solution:
    """The best kernels of the ghosts, given the intrinsic maps: a system of w D unknowns for each group."""
    count, width = assignment.intrinsic.shape
    taps, size = stats.gram.shape[:2]
    index, targets = _by_group(assignment, assignment.ghosts)  # padded where a group has fewer ghosts
    step = max(1, 2**26 // (width * taps * taps * size))
    solved = []
    for a, ghosts in zip(coordinates.reshape(count, width, -1).split(step), targets.split(step), strict=True):
        half = torch.einsum("gwb,dbec->gwdec", a, stats.gram)
        gram = torch.einsum("gwdec,gvc->gwdve", half, a).reshape(len(a), width * taps, width * taps)
        right = torch.einsum("gwb,dbgt->gwdt", a, stats.cross[:, :, ghosts]).flatten(1, 2)
        solved.append(solve_damped(gram, right, damping_for(gram, stats.rows)))
    kernels = torch.cat(solved).transpose(1, 2)[index]
    return Solution(assignment, coordinates, kernels.reshape(len(kernels), width, taps))


def _by_group(assignment: GhostAssignment, values: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The index of each ghost in a table of groups x ghosts, and the values of the ghosts (ghosts x ...) as that
    table."""
    owner = assignment.sources[:, 0] // assignment.intrinsic.shape[1]
    ranks = rank_in_group(owner)
    table = values.new_zeros(len(assignment.intrinsic), int(ranks.max()) + 1, *values.shape[1:])
    table[owner, ranks] = values
    return (owner, ranks), table


def _refit_jointly(stats: JointStatistics, solution: Solution, weights: Tensor) -> Solution:
    """Joint refit for w = 1: alternately the intrinsic coordinates and the kernels in closed form, while the error
    falls."""
    best, least_error = solution, (weights * stats.squared_errors(solution)).sum()
    for _ in range(MAX_JOINT_STEPS):
        solution = _with_kernels(stats, solution.assignment, _refit_coordinates(stats, best, weights))
        error = (weights * stats.squared_errors(solution)).sum()
        if error >= least_error:
            break
        best, gain, least_error = solution, (least_error - error) / least_error.clamp_min(1e-30), error
        if gain < MIN_JOINT_GAIN:
            break
    return best


def _refit_coordinates(stats: JointStatistics, solution: Solution, weights: Tensor) -> Tensor:
    """The intrinsic maps that best predict their own outputs and those of their ghosts, given the kernels (w = 1): m
    linear systems."""
    assignment, (taps, size) = solution.assignment, stats.gram.shape[:2]
    intrinsic = assignment.intrinsic.flatten()
    owner = assignment.sources[:, 0]
    kernels, ghost_weights = solution.kernels[:, 0], weights[assignment.ghosts]
    centre_gram, centre_cross = _centre_moments(stats)
    pairs = torch.zeros(len(intrinsic), taps * taps, dtype=weights.dtype)
    pairs.index_add_(0, owner, ghost_weights[:, None] * torch.einsum("jd,je->jde", kernels, kernels).flatten(1))
    right = weights[intrinsic, None] * centre_cross[:, intrinsic].T
    ghost_terms = torch.einsum("jd,dbj->jb", kernels, stats.cross[:, :, assignment.ghosts])
    right = right.index_add(0, owner, ghost_weights[:, None] * ghost_terms)
    by_tap_pair = stats.gram.permute(0, 2, 1, 3).reshape(taps * taps, size * size)
    coordinates = torch.empty_like(solution.intrinsic)
    step = max(1, 2**25 // size**2)
    for a in range(0, len(intrinsic), step):
        b = min(a + step, len(intrinsic))
        systems = (pairs[a:b] @ by_tap_pair).reshape(-1, size, size)
        systems = systems + weights[intrinsic[a:b], None, None] * centre_gram
        damping = 10 * damping_for(systems, stats.rows)
        residual = right[a:b] - torch.einsum("ibc,ic->ib", systems, solution.intrinsic[a:b])
        coordinates[a:b] = solution.intrinsic[a:b] + solve_damped(systems, residual[..., None], damping)[..., 0]
    return coordinates


def _centre_moments(stats: JointStatistics) -> tuple[Tensor, Tensor]:
    """Moments of the basis at the centre with itself and the targets; not centred where the bias is an unknown."""
    gram, cross = stats.gram[stats.centre, :, stats.centre], stats.cross[stats.centre]
    if not stats.constant:
        return gram, cross
    mean = stats.mean_v[stats.centre]
    return gram + torch.outer(mean, mean), cross + torch.outer(mean, stats.mean_y)


def _reduced_rank(
    stats: JointStatistics, assignment: GhostAssignment, metric: Tensor
) -> tuple[GhostAssignment, Tensor]:
    """The w maps of each group that predict all its outputs best (leading eigenvectors), as w of the outputs.

    Reduced-rank regression of L' y, with M = L L'. Any rank-w prediction A B with an invertible w x w block of A equals
    one whose w rows there are the identity, so that concatenation loses nothing against low rank. Pivoted QR finds a
    well-conditioned block.
    """
    centre = stats.centre
    gram = stats.gram[centre, :, centre]
    width = assignment.intrinsic.shape[1]
    intrinsic, sources, ghosts, coordinates = [], [], [], []
    for g, members in enumerate(assignment.members()):
        factor = cholesky_root(metric[members][:, members])
        prediction = factor.T @ stats.initial_coordinates[members]
        moment = prediction @ gram @ prediction.T
        vectors = torch.linalg.eigh((moment + moment.T) / 2).eigenvectors[:, -width:]
        loadings = torch.linalg.solve_triangular(factor.T, vectors, upper=True)
        rows = torch.from_numpy(qr(loadings.T.numpy(), mode="r", pivoting=True)[1][:width].copy()).long()
        coordinates.append(loadings[rows] @ (vectors.T @ prediction))
        is_ghost = torch.ones(len(members), dtype=torch.bool)
        is_ghost[rows] = False
        intrinsic.append(members[rows])
        ghosts.append(members[is_ghost])
        sources.append(torch.arange(g * width, (g + 1) * width).expand(int(is_ghost.sum()), width))
    selected = replace(
        assignment, intrinsic=torch.stack(intrinsic), ghosts=torch.cat(ghosts), sources=torch.cat(sources)
    )
    return selected, torch.cat(coordinates)


@dataclass(frozen=True)
class FitMethod:
    """The steps of a fit that can be replaced, in order to measure their effect.

    `refit_filters` has the signature of `refit_filters`, `assign_ghosts` takes errors of pairs (n x n) and a layout,
    `refit_jointly` takes statistics, an initial solution and weights of the outputs (n).
    """

    refit_filters: Callable[..., Tensor] = refit_filters
    assign_ghosts: Callable[[Tensor, GhostLayout], GhostAssignment] = assign_ghosts
    refit_jointly: Callable[[JointStatistics, Solution, Tensor], Solution] = _refit_jointly


DEFAULT_METHOD = FitMethod()
