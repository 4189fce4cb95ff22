import pytest
import torch

from ghostify import Policy, Rule, trace
from ghostify.planning.planner import PlanTarget, resolve_targets
from ghostify.search import layer_statistics
from tests import nets


def statistics_of(calibration, cheap="auto"):
    program = trace(nets.settle(nets.Straight(16)), nets.images(1))
    target_list = [
        t for t in resolve_targets(program, Policy((Rule(cheap=cheap),), keep_first=False)) if isinstance(t, PlanTarget)
    ]
    return target_list, list(layer_statistics.compute_layer_statistics(program, target_list, calibration, 0))


@pytest.mark.parametrize("limit", [1, 20_000, 2**40])
def test_profiles_of_few_layers_at_a_time_are_the_same(limit, monkeypatch):
    torch.manual_seed(0)
    batches = nets.images(16).split(8)
    torch.manual_seed(0)
    whole = statistics_of(batches)[1]
    monkeypatch.setattr(layer_statistics, "MAX_BYTES", limit)
    torch.manual_seed(0)
    target_list, chunked = statistics_of(batches)
    assert len(target_list) == len(chunked) == len(whole) == 3
    for first, other in zip(whole, chunked, strict=True):
        assert torch.equal(first.metric, other.metric)
        assert all(torch.equal(a, b) for a, b in zip(first.covariances, other.covariances, strict=True))
        assert torch.equal(first.maps.cross, other.maps.cross)


def test_some_maps_answer_for_those_that_they_predict():
    """Errors of a map count once more for each that is made of it."""
    mixing = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, -1.0]], dtype=torch.float64)
    metric = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    whole = layer_statistics.LayerStatistics((mixing @ mixing.T,), None, metric)
    of_kept = whole.restrict_to((0, 1))
    assert torch.equal(of_kept.covariances[0], torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(of_kept.metric, mixing.T @ metric @ mixing, rtol=1e-4, atol=1e-4)


def test_groups_keep_within_the_limit(monkeypatch):
    target_list = statistics_of(None)[0]
    sizes = [8 * t.conv.outputs**2 * 11 for t in target_list]
    monkeypatch.setattr(layer_statistics, "MAX_BYTES", max(sizes))
    chunks = list(layer_statistics._chunks(target_list))
    assert [t for chunk in chunks for t in chunk] == target_list
    assert all(sum(8 * t.conv.outputs**2 * 11 for t in chunk) <= max(sizes) for chunk in chunks)
    assert len(chunks) > 1


def test_without_images_profiles_come_one_by_one():
    program = trace(nets.settle(nets.Straight()), nets.images(1))
    target_list = [t for t in resolve_targets(program, Policy()) if isinstance(t, PlanTarget)]
    statistics = layer_statistics.compute_layer_statistics(program, target_list, None, 0)
    assert next(statistics).maps is not None
    assert statistics_of(None, cheap="pointwise")[1][0].maps is None
