import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from ghostify import trace
from ghostify.fitting.sensitivity import prepare_calibration
from ghostify.pruning.pruning_groups import PruningGroup, find_pruning_groups
from ghostify.search.group_statistics import compute_group_statistics
from tests import nets


def groups_of(program):
    """Those of one producer."""
    prunable = (group for group in find_pruning_groups(program) if isinstance(group, PruningGroup))
    return [group for group in prunable if not group.channels.residual]


@pytest.fixture
def statistics():
    program, x = trace(nets.settle(nets.Inverted()), nets.images(1)), nets.images(32)
    (statistics,) = compute_group_statistics(program, groups_of(program), prepare_calibration(program, x.split(8)), 0)
    return statistics


def test_fewer_maps_lose_more(statistics):
    losses = [statistics.loss(count) for count in range(4, 49, 4)]
    assert all(b <= 1.05 * a + 1e-6 for a, b in itertools.pairwise(losses))
    assert losses[-1] == pytest.approx(0, abs=1e-6)


def test_maps_are_kept_in_the_originals_order(statistics):
    for count in (1, 7, 24):
        kept = statistics.kept(count)
        assert len(set(kept)) == count
        assert list(kept) == sorted(kept)
    assert set(statistics.kept(7)) < set(statistics.kept(24))


def test_a_group_that_no_image_reaches_is_left_out():
    class Seldom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.seldom = nets.Straight(), nets.Straight()

        def forward(self, x):
            return self.seldom(x) if x.mean() > 9 else self.often(x)

    model, x = nets.settle(Seldom()), nets.images(8)
    program = trace(model, x + 100)
    reached = trace(model, x)
    for traced, path, count in ((program, "seldom", 0), (reached, "often", 3)):
        groups = groups_of(traced)
        assert {group.subgraph_path for group in groups} == {path}
        assert len(groups) == 3
        assert len(compute_group_statistics(traced, groups, prepare_calibration(traced, x), 0)) == count


@pytest.mark.parametrize("bias", [False, True])
def test_a_constant_is_free_only_where_something_takes_it_up(bias):
    """A map that is always 5 says nothing beyond its mean, which a consumer without a bias cannot add."""
    first, last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1, bias=bias)
    with torch.no_grad():
        first.weight[2], first.bias[2] = 0, 5
    program = trace(nn.Sequential(nn.Conv2d(3, 3, 1), first, last).eval(), nets.images(1))
    (statistics,) = [
        t
        for t in compute_group_statistics(program, groups_of(program), prepare_calibration(program, nets.images(32)), 0)
        if t.group.size == 6
    ]
    assert (statistics.ranking[0] == 2) is not bias
    assert (2 in statistics.kept(3)) is not bias


def test_without_sensitivities_the_consumers_outputs_count_alike():
    program, x = trace(nets.settle(nets.Inverted()), nets.images(1)), nets.images(16)
    calibration = prepare_calibration(program, x)
    without_sensitivity = replace(calibration, sensitivity={})
    (statistics,) = compute_group_statistics(program, groups_of(program), without_sensitivity, 0)
    assert 0 < statistics.loss(2) < 1
    assert torch.isfinite(statistics.consumers[0].importance).all()


def test_a_residual_stream_adds_the_errors_of_all_its_consumers():
    program, x = trace(nets.settle(nets.Residual()), nets.images(1)), nets.images(32)
    (stream,) = [g for g in find_pruning_groups(program) if isinstance(g, PruningGroup) and g.channels.residual]
    (statistics,) = compute_group_statistics(program, [stream], prepare_calibration(program, x.split(8)), 0)
    assert len(statistics.consumers) == 2
    assert statistics.loss(3) == pytest.approx(sum(c.loss(statistics.kept(3)) for c in statistics.consumers))
    assert statistics.loss(3) > max(consumer.loss(statistics.kept(3)) for consumer in statistics.consumers) > 0
