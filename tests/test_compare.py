"""The comparison on a tiny network: every method has rows within its limit, and the comparison resumes."""

import copy

import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks.experiments import compare
from benchmarks.lib import rivals
from benchmarks.lib.bn_statistics import with_better_statistics
from ghostify.cli.demo_network import ResidualNet
from ghostify.data.training_data import TrainingData
from ghostify.evaluation.metrics import predict
from tests.nets import settle


def subject():
    model = settle(ResidualNet(8, 16))
    x = torch.randn(288, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    reference = predict(model, [x[:32]])

    def training_data(_):
        datasets = (TensorDataset(images, torch.full((len(images),), -1)) for images in (x[32:], x[:32]))
        return TrainingData(*datasets, labelled=False)

    def closeness(small):
        return -float((predict(small, [x[:32]]) - reference).square().mean())

    labels = torch.arange(32) % 10
    return compare.Subject(
        model, lambda _: rivals.CalibrationImages(x[32:64].split(8), labels.split(8)), x[:2], closeness, training_data
    )


@pytest.mark.slow
def test_every_method_keeps_within_its_limit(monkeypatch):
    half = [("macs", 0.5)]
    monkeypatch.setattr(compare, "_time", lambda *_: 0.5)
    network = subject()
    rows = list(compare.rows(network, [], (0,), limits=half))
    assert [r.get("method", "original") for r in rows] == ["original", *compare.METHODS]
    assert all(r["macs"] <= 0.5 for r in rows[1:])
    assert rows[0]["score"] == 0
    best = {r["method"]: r["score"] for r in rows[1:]}
    assert max(best, key=best.get) in ("ghostify, auto and narrow", "ghostify, auto", "low rank")
    assert best["ghostify, depthwise"] > best["ghost, first filters kept"]
    assert list(compare.rows(network, rows, (0,), limits=half)) == rows
    assert all(r["latency"] == 0.5 for r in rows[1:])
    monkeypatch.setattr(compare, "METHODS", {"low rank": compare.METHODS["low rank"]})
    limits = [*half, ("latency", 0.6)]
    *_, further = compare.rows(network, rows, (1,), limits=limits)
    *_, untimed = compare.rows(network, rows[:1], (0,), untimed=True, limits=limits)
    for row, seed in ((further, 1), (untimed, 0)):
        assert (row["how"], row["latency"]) == (f"low rank, macs 0.5, seed {seed}", None)
    table = compare.comparison(rows)
    assert f"| ghostify, auto with pruning | macs 0.5 | {100 * rows[1]['macs']:.0f} | 50 |" in table


@pytest.mark.parametrize("method", [m for m in compare.METHODS if m.startswith("ghost")])
def test_an_infeasible_limit_gives_no_row(method):
    network = subject()
    assert compare.METHODS[method](network, network.calibration(0), ("macs", 0.01), 0) is None


@pytest.mark.parametrize("changed", [False, True])
def test_old_statistics_are_kept_where_they_are_better(changed):
    torch.manual_seed(0)
    many, few = torch.randn(96, 1, 12, 12).split([64, 32])
    model, few = compare.networks.reestimated(settle(ResidualNet(8, 16)), [many]), rivals.CalibrationImages((few,))
    compressed = copy.deepcopy(model)
    if changed:
        compressed.load_state_dict({k: v * 9 if "running_var" in k else v for k, v in compressed.state_dict().items()})
    assert (with_better_statistics(compressed, model, few) is compressed) is not changed
