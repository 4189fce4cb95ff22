import networkx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostify.fitting.assignment import assign_ghosts, paper_assignment
from ghostify.modules.layout import Depthwise, GhostLayout, round_up_width


def total(costs, assignment):
    return sum(
        costs[assignment.channels[s], g].item()
        for (s,), g in zip(assignment.sources.tolist(), assignment.ghosts, strict=True)
    )


@given(st.integers(2, 24), st.data())
def test_the_assignment_has_the_layouts_shape(outputs, data):
    intrinsic = data.draw(st.integers(1, outputs - 1))
    width = round_up_width(outputs, intrinsic, data.draw(st.sampled_from([1, 2, intrinsic])))
    layout = GhostLayout.of_width(outputs, intrinsic, width, 3)
    costs = torch.rand(outputs, outputs, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    assignment = assign_ghosts(costs, layout)
    assert sorted(assignment.channels.tolist()) == list(range(outputs))
    assert assignment.intrinsic.shape == (intrinsic // width, width)
    owners = (assignment.sources[:, 0] // width).tolist()
    assert owners == sorted(owners)
    assert tuple(owners.count(k) for k in range(intrinsic // width)) == layout.capacities
    assert sorted(torch.cat(assignment.members()).tolist()) == list(range(outputs))


@given(st.integers(2, 8), st.integers(0, 999))
def test_pairs_are_near_the_best_matching(half, seed):
    n = 2 * half
    costs = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = torch.minimum(costs, costs.T)
    graph = networkx.Graph()
    graph.add_weighted_edges_from((i, j, 2 - best[i, j].item()) for i in range(n) for j in range(i))
    matching = networkx.max_weight_matching(graph, maxcardinality=True)
    exact = sum(best[i, j].item() for i, j in matching)
    cost = total(costs, assign_ghosts(costs, GhostLayout(n, half, Depthwise(3))))
    assert exact - 1e-9 <= cost <= exact + 0.12 * n


def test_obvious_pairs_and_directions_are_found():
    costs = torch.full((6, 6), 9.0)
    for ghost_of, ghost in ((4, 0), (1, 5), (3, 2)):
        costs[ghost_of, ghost] = 0.1
    assignment = assign_ghosts(costs, GhostLayout(6, 3, Depthwise(3)))
    assert {
        (int(assignment.channels[s]), int(g)) for (s,), g in zip(assignment.sources, assignment.ghosts, strict=True)
    } == {
        (4, 0),
        (1, 5),
        (3, 2),
    }


def test_obvious_centres_are_found():
    costs = torch.full((8, 8), 5.0)
    costs[2, [0, 1, 3]] = 0.1
    costs[7, [4, 5, 6]] = 0.1
    assignment = assign_ghosts(costs, GhostLayout(8, 2, Depthwise(3)))
    assert set(assignment.intrinsic.flatten().tolist()) == {2, 7}
    assert total(costs, assignment) == pytest.approx(0.6)


def test_the_papers_assignment():
    assignment = paper_assignment(GhostLayout(7, 3, Depthwise(3)))
    assert assignment.channels.tolist() == list(range(7))
    assert assignment.sources.flatten().tolist() == [0, 0, 1, 2]
