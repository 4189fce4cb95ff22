import pytest
import torch

from ghostify.fitting.assignment import assign_ghosts, paper_assignment
from ghostify.fitting.depthwise_statistics import assigned_statistics, map_statistics, sources_of
from ghostify.fitting.ghost_statistics import Solution
from ghostify.fitting.moments import AssignedMoments, PerMapMoments
from ghostify.fitting.patches import flatten_positions, unfold_neighbours
from ghostify.modules.layout import Depthwise, GhostLayout

LAYOUTS = [
    GhostLayout(6, 3, Depthwise(3)),
    GhostLayout(7, 3, Depthwise(3)),
    GhostLayout(8, 2, Depthwise(3)),
    GhostLayout(6, 5, Depthwise(3)),
]


def maps_and_targets(outputs):
    """Rows of 3 x 3 neighbours of maps, and targets that are filtered maps plus noise and a constant."""
    torch.manual_seed(0)
    maps = torch.randn(6, outputs, 10, 10, dtype=torch.float64) + 2
    inner = maps[:, :, 1:-1, 1:-1]
    targets = inner + 0.5 * maps[:, :, :-2, 1:-1].roll(1, 1) + 0.2 * torch.randn_like(inner) + 3
    return unfold_neighbours(maps, 3), flatten_positions(targets)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_errors_and_constants_are_those_of_least_squares(layout):
    v, y = maps_and_targets(layout.outputs)
    assignment = paper_assignment(layout)
    moments = AssignedMoments.zero(layout.intrinsic, 9, layout.outputs)
    intrinsic = assignment.intrinsic[:, 0]
    moments.add(v[:, :, intrinsic], y[:, assignment.channels], sources_of(assignment))
    stats = assigned_statistics(moments, assignment, torch.eye(layout.outputs)[intrinsic], None, free_mean=True)
    kernels = stats.kernels()
    fitted = Solution(assignment, torch.eye(layout.intrinsic), kernels)
    errors, constants = stats.squared_errors(fitted), stats.mean_residuals(fitted)
    for k, (ghost, source) in enumerate(zip(assignment.ghosts, assignment.sources[:, 0], strict=True)):
        u = torch.cat((v[:, :, intrinsic[source]], torch.ones(len(v), 1)), 1)
        solution = torch.linalg.lstsq(u, y[:, ghost, None]).solution[:, 0]
        torch.testing.assert_close(kernels[k, 0], solution[:9], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(errors[ghost], (y[:, ghost] - u @ solution).square().mean(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(constants[ghost], (y[:, ghost] - v[:, :, intrinsic[source]] @ kernels[k, 0]).mean())
    for channel in intrinsic:
        residual = y[:, channel] - v[:, 4, channel]
        torch.testing.assert_close(constants[channel], residual.mean())
        torch.testing.assert_close(errors[channel], residual.var(correction=0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_selected_from_all_pairs_are_those_of_the_assigned_pairs(layout):
    v, y = maps_and_targets(layout.outputs)
    map_moments = PerMapMoments.zero(layout.outputs, 9)
    map_moments.add(v, y)
    per_map = map_statistics(map_moments)
    costs = per_map.pair_errors(torch.ones(layout.outputs))
    assignment = assign_ghosts(costs, layout)
    selected = per_map.assigned(assignment, torch.eye(layout.outputs, dtype=torch.float64))
    moments = AssignedMoments.zero(layout.intrinsic, 9, layout.outputs)
    moments.add(v[:, :, assignment.intrinsic[:, 0]], y[:, assignment.channels], sources_of(assignment))
    expected = assigned_statistics(moments, assignment, selected.basis, None, free_mean=True)
    for name in ("auto", "cross", "var", "mean_v", "mean_y"):
        torch.testing.assert_close(getattr(selected, name), getattr(expected, name))
    errors = selected.squared_errors(Solution(assignment, torch.eye(layout.intrinsic), selected.kernels()))
    assert errors[assignment.ghosts].sum().item() == pytest.approx(assignment.total(costs), rel=1e-3)
