import pytest
import torch

from ghostify import Policy, Rule, trace
from ghostify.planning.planner import PlanTarget, resolve_targets
from ghostify.search import layer_statistics
from tests import nets


def profiles(calibration, cheap="auto"):
    program = trace(nets.settle(nets.Straight(16)), nets.images(1))
    wished = [
        t for t in resolve_targets(program, Policy((Rule(cheap=cheap),), keep_first=False)) if isinstance(t, PlanTarget)
    ]
    return wished, list(layer_statistics.compute_layer_statistics(program, wished, calibration, 0))


@pytest.mark.parametrize("limit", [1, 20_000, 2**40])
def test_profiles_of_few_layers_at_a_time_are_the_same(limit, monkeypatch):
    torch.manual_seed(0)
    batches = nets.images(16).split(8)
    torch.manual_seed(0)
    whole = profiles(batches)[1]
    monkeypatch.setattr(layer_statistics, "MAX_BYTES", limit)
    torch.manual_seed(0)
    wished, parted = profiles(batches)
    assert len(wished) == len(parted) == len(whole) == 3
    for one, other in zip(whole, parted, strict=True):
        assert torch.equal(one.metric, other.metric)
        assert all(torch.equal(a, b) for a, b in zip(one.covariances, other.covariances, strict=True))
        assert torch.equal(one.maps.cross, other.maps.cross)


def test_some_maps_answer_for_those_that_they_predict():
    """Errors of a map count once more for each that is made of it."""
    mixing = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, -1.0]], dtype=torch.float64)
    metric = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    whole = layer_statistics.LayerStatistics((mixing @ mixing.T,), None, metric)
    some = whole.restrict_to((0, 1))
    assert torch.equal(some.covariances[0], torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(some.metric, mixing.T @ metric @ mixing, rtol=1e-4, atol=1e-4)


def test_groups_keep_within_the_limit(monkeypatch):
    wished = profiles(None)[0]
    sizes = [8 * t.conv.outputs**2 * 11 for t in wished]
    monkeypatch.setattr(layer_statistics, "MAX_BYTES", max(sizes))
    groups = list(layer_statistics._chunks(wished))
    assert [t for group in groups for t in group] == wished
    assert all(sum(8 * t.conv.outputs**2 * 11 for t in group) <= max(sizes) for group in groups)
    assert len(groups) > 1


def test_without_images_profiles_come_one_by_one():
    program = trace(nets.settle(nets.Straight()), nets.images(1))
    wished = [t for t in resolve_targets(program, Policy()) if isinstance(t, PlanTarget)]
    coming = layer_statistics.compute_layer_statistics(program, wished, None, 0)
    assert next(coming).maps is not None
    assert profiles(None, cheap="pointwise")[1][0].maps is None
