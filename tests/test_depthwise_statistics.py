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


def seen(outputs):
    """Maps with a margin of one at some places, and targets that are filtered maps plus noise and a constant."""
    torch.manual_seed(0)
    wide = torch.randn(6, outputs, 10, 10, dtype=torch.float64) + 2
    middle = wide[:, :, 1:-1, 1:-1]
    targets = middle + 0.5 * wide[:, :, :-2, 1:-1].roll(1, 1) + 0.2 * torch.randn_like(middle) + 3
    return unfold_neighbours(wide, 3), flatten_positions(targets)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_errors_and_constants_are_those_of_least_squares(layout):
    v, y = seen(layout.outputs)
    groups = paper_assignment(layout)
    moments = AssignedMoments.zero(layout.intrinsic, 9, layout.outputs)
    own = groups.intrinsic[:, 0]
    moments.add(v[:, :, own], y[:, groups.channels], sources_of(groups))
    links = assigned_statistics(moments, groups, torch.eye(layout.outputs)[own], None, free_mean=True)
    kernels = links.kernels()
    found = Solution(groups, torch.eye(layout.intrinsic), kernels)
    errors, constants = links.squared_errors(found), links.mean_residuals(found)
    for k, (ghost, source) in enumerate(zip(groups.ghosts, groups.sources[:, 0], strict=True)):
        u = torch.cat((v[:, :, own[source]], torch.ones(len(v), 1)), 1)
        solution = torch.linalg.lstsq(u, y[:, ghost, None]).solution[:, 0]
        torch.testing.assert_close(kernels[k, 0], solution[:9], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(errors[ghost], (y[:, ghost] - u @ solution).square().mean(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(constants[ghost], (y[:, ghost] - v[:, :, own[source]] @ kernels[k, 0]).mean())
    for channel in own:
        lacks = y[:, channel] - v[:, 4, channel]
        torch.testing.assert_close(constants[channel], lacks.mean())
        torch.testing.assert_close(errors[channel], lacks.var(correction=0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_links_cut_from_all_pairs_are_those_taken_one_by_one(layout):
    v, y = seen(layout.outputs)
    everything = PerMapMoments.zero(layout.outputs, 9)
    everything.add(v, y)
    maps = map_statistics(everything)
    costs = maps.pair_errors(torch.ones(layout.outputs))
    groups = assign_ghosts(costs, layout)
    cut = maps.assigned(groups, torch.eye(layout.outputs, dtype=torch.float64))
    moments = AssignedMoments.zero(layout.intrinsic, 9, layout.outputs)
    moments.add(v[:, :, groups.intrinsic[:, 0]], y[:, groups.channels], sources_of(groups))
    taken = assigned_statistics(moments, groups, cut.basis, None, free_mean=True)
    for name in ("auto", "cross", "var", "mean_v", "mean_y"):
        torch.testing.assert_close(getattr(cut, name), getattr(taken, name))
    errors = cut.squared_errors(Solution(groups, torch.eye(layout.intrinsic), cut.kernels()))
    assert errors[groups.ghosts].sum().item() == pytest.approx(groups.total(costs), rel=1e-3)
