import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ghostify.fitting import lstsq
from ghostify.fitting.assignment import GhostAssignment
from ghostify.fitting.linear_solvers import solve_ridge
from ghostify.fitting.lstsq import JointStatistics
from ghostify.fitting.moments import Moments, SplitMoments
from ghostify.modules.layout import Depthwise, GhostLayout, Pointwise


def moments_of(u, y):
    moments = Moments.zero(u.shape[1], y.shape[1])
    for us, ys in zip(u.split(7), y.split(7), strict=True):
        moments.add(us, ys)
    return moments


@given(st.integers(0, 99), st.integers(8, 60))
@settings(max_examples=25)
def test_streamed_ridge_equals_lstsq_on_materialised_data(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    u, y = (torch.randn(rows, k, generator=generator, dtype=torch.float64) for k in (5, 3))
    prior = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    uu, uy, _ = moments_of(u, y).raw()
    strength = 0.1 * uu.diagonal().mean()
    stacked = torch.cat((u / rows**0.5, strength.sqrt() * torch.eye(5, dtype=torch.float64)))
    stacked_targets = torch.cat((y / rows**0.5, strength.sqrt() * prior))
    expected = torch.linalg.lstsq(stacked, stacked_targets).solution
    torch.testing.assert_close(solve_ridge(uu, uy, prior, 0.1), expected)


def test_the_filter_refit_uses_the_ridge_with_the_smallest_holdout_error():
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    true = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    fitted, holdout = moments_of(u[:200], u[:200] @ true + 2), moments_of(u[200:], u[200:] @ true + 2)
    assert (
        lstsq.best_ridge(fitted.centred(), holdout.centred(), torch.zeros_like(true), torch.ones(4), 0.1).ridge == 1e-4
    )
    filters = lstsq.refit_filters(SplitMoments(fitted, holdout), torch.zeros_like(true), torch.ones(4), free_mean=True)
    torch.testing.assert_close(filters, true, rtol=1e-3, atol=1e-3)
    few = moments_of(u[:8], u[:8] @ true + 3 * torch.randn(8, 4, generator=generator, dtype=torch.float64))
    choice = lstsq.best_ridge(few.centred(), holdout.centred(), true, torch.ones(4), 0.01)
    assert choice.share < 0.01
    refitted = lstsq.refit_filters(SplitMoments(few, holdout), true, torch.ones(4), free_mean=True)
    torch.testing.assert_close(refitted, true, rtol=0.01, atol=0.01)


@given(st.integers(0, 99))
def test_the_share_is_the_best_one_on_the_holdout(seed):
    generator = torch.Generator().manual_seed(seed)
    u, y = (torch.randn(60, k, generator=generator, dtype=torch.float64) for k in (6, 4))
    fitted, holdout, prior = moments_of(u[:20], y[:20]), moments_of(u[20:], y[20:]), torch.zeros(6, 4).double()
    weights = torch.rand(4, generator=generator, dtype=torch.float64)
    choice = lstsq.best_ridge(fitted.centred(), holdout.centred(), prior, weights, 0.1)
    whole = solve_ridge(*fitted.centred()[:2], prior, choice.ridge)
    errors = [
        float((weights * holdout.errors_of(s * whole, torch.arange(4), free_mean=True)).sum())
        for s in (choice.share, 0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert min(errors) >= errors[0] - 1e-9


def maps_statistics(maps, targets, d):
    """Statistics of maps (N x b x H x W) and targets, with the maps themselves as refitted maps."""
    b = maps.shape[1]
    shifts = F.unfold(maps, d, padding=d // 2).reshape(len(maps), b, d * d, -1).permute(0, 3, 2, 1).flatten(0, 1)
    y = targets.permute(0, 2, 3, 1).flatten(0, 2)
    moments = moments_of(shifts.flatten(1), y)
    gram, cross, var = moments.centred()
    return (
        JointStatistics(
            gram.reshape(d * d, b, d * d, b),
            cross.reshape(d * d, b, -1),
            var,
            moments.mean_u.reshape(d * d, b),
            moments.mean_y,
            torch.eye(b, dtype=torch.float64),
            torch.eye(b, dtype=torch.float64),
            float(moments.count),
        ),
        shifts,
        y,
    )


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_kernels_equal_lstsq_on_materialised_data(d, width):
    maps = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    stats, shifts, y = maps_statistics(maps, maps + 0.1 * maps.flip(1), d)
    assignment = GhostAssignment(
        torch.arange(4).reshape(-1, width),
        torch.arange(4, 8),
        torch.arange(4).reshape(-1, width).repeat_interleave(width, 0),
    )
    solution = lstsq._with_kernels(stats, assignment, stats.initial_coordinates[:4])
    for j, ghost in enumerate(assignment.ghosts):
        features = shifts[:, :, assignment.sources[j]].transpose(1, 2).flatten(1)
        centred = features - features.mean(0)
        expected = torch.linalg.lstsq(centred, (y[:, ghost] - y[:, ghost].mean())[:, None], driver="gelsd").solution
        torch.testing.assert_close(solution.kernels[j].flatten(), expected.flatten(), rtol=2e-2, atol=2e-3)


def test_errors_and_constants_are_those_of_the_prediction():
    maps = torch.randn(4, 6, 6, 6, dtype=torch.float64)
    targets = maps + 0.3 * maps.roll(1, 1) + 5
    stats, shifts, y = maps_statistics(maps, targets, 3)
    solution = lstsq.solve_ghosts(stats, GhostLayout(6, 3, Depthwise(3)), torch.eye(6, dtype=torch.float64))
    channels = solution.assignment.channels
    prediction = torch.empty_like(y)
    prediction[:, channels[:3]] = shifts[:, 4] @ solution.intrinsic.T
    neighbours = torch.einsum("pdb,jb->pjd", shifts, solution.intrinsic[solution.assignment.sources[:, 0]])
    prediction[:, channels[3:]] = (neighbours * solution.kernels[:, 0]).sum(2)
    constants = stats.mean_residuals(solution)
    torch.testing.assert_close((y - prediction).mean(0), constants)
    torch.testing.assert_close((y - prediction - constants).square().mean(0), stats.squared_errors(solution))


def test_the_joint_refit_lowers_the_error():
    torch.manual_seed(0)
    mixing = torch.randn(10, 4, dtype=torch.float64)
    maps = torch.einsum("ij,njhw->nihw", mixing, torch.randn(8, 4, 10, 10, dtype=torch.float64))
    stats, _, _ = maps_statistics(maps, maps, 3)
    weights = torch.rand(10, dtype=torch.float64) + 0.1
    assignment = lstsq.assign_ghosts(lstsq.pair_costs(stats, weights), GhostLayout(10, 5, Depthwise(3)))
    before = lstsq._with_kernels(stats, assignment, stats.initial_coordinates[assignment.intrinsic.flatten()])
    after = lstsq._refit_jointly(stats, before, weights)
    assert (weights * stats.squared_errors(after)).sum() < 0.99 * (weights * stats.squared_errors(before)).sum()


def test_pointwise_ghosts_reach_the_error_of_low_rank():
    maps = torch.randn(4, 8, 8, 8, dtype=torch.float64)
    mixed = torch.einsum("ij,njhw->nihw", torch.randn(8, 8, dtype=torch.float64), maps)
    stats, _, _ = maps_statistics(mixed, mixed, 1)
    solution = lstsq.solve_ghosts(stats, GhostLayout(8, 3, Pointwise()), torch.eye(8, dtype=torch.float64))
    values = torch.linalg.eigvalsh(stats.gram[0, :, 0])
    assert stats.squared_errors(solution).sum().item() == pytest.approx(values[:5].sum().item(), rel=1e-2)


class Largest(TorchDispatchMode):
    """Number of elements of the largest storage among all results."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        stored = (t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(result) if torch.is_tensor(t))
        self.elements = max(self.elements, *stored, 0)
        return result


def test_ghosts_of_one_group_share_its_system():
    n = 64
    maps = torch.randn(8, n, 8, 8, dtype=torch.float64)
    stats, _, _ = maps_statistics(maps + maps.roll(1, 1), maps, 1)
    with Largest() as largest:
        solution = lstsq.solve_ghosts(stats, GhostLayout(n, n // 2, Pointwise()), torch.eye(n, dtype=torch.float64))
        stats.squared_errors(solution)
        stats.mean_residuals(solution)
    assert n * n <= largest.elements <= 2 * n * n


def test_pointwise_ghosts_are_the_best_low_rank_by_the_metric():
    torch.manual_seed(0)
    mixed = torch.einsum("ij,njhw->nihw", torch.randn(8, 8).double(), torch.randn(4, 8, 8, 8).double())
    stats, shifts, y = maps_statistics(mixed, mixed, 1)
    metric = torch.cov(torch.randn(8, 3, dtype=torch.float64)) + 0.05 * torch.eye(8, dtype=torch.float64)
    solution = lstsq.solve_ghosts(stats, GhostLayout(8, 3, Pointwise()), metric)
    channels = solution.assignment.channels
    prediction = torch.empty_like(y)
    prediction[:, channels[:3]] = shifts[:, 0] @ solution.intrinsic.T
    prediction[:, channels[3:]] = prediction[:, channels[:3]] @ solution.kernels[:, :, 0].T
    errors = torch.cov((y - prediction).T, correction=0)
    values, vectors = torch.linalg.eigh(metric)
    root = (vectors * values.sqrt()) @ vectors.T
    least = torch.linalg.eigvalsh(root @ stats.gram[0, :, 0] @ root)[:5].sum()
    assert (metric * errors).sum().item() == pytest.approx(least.item(), rel=1e-2)


def test_dead_and_duplicate_maps_give_finite_kernels():
    maps = torch.randn(3, 6, 5, 5, dtype=torch.float64)
    maps[:, 1] = 0
    maps[:, 3] = maps[:, 2]
    for d, layout in (
        (3, GhostLayout(6, 3, Depthwise(3))),
        (1, GhostLayout(6, 3, Pointwise())),
        (1, GhostLayout(6, 2, Depthwise(1))),
    ):
        stats, _, _ = maps_statistics(maps, maps, d)
        solution = lstsq.solve_ghosts(stats, layout, torch.eye(6, dtype=torch.float64))
        assert solution.kernels.isfinite().all()
        assert stats.squared_errors(solution)[1] < 1e-6
