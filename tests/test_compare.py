"""The comparison on a tiny network: every method has its rows, within its limit, and goes on where it ended."""

import copy

import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks.experiments import compare
from benchmarks.lib import rivals
from ghostify.cli.demo_network import ResidualNet
from ghostify.data.training_data import TrainingData
from ghostify.evaluation.metrics import predict
from tests.nets import settle


def subject():
    model = settle(ResidualNet(8, 16))
    x = torch.randn(288, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    wanted = predict(model, [x[:32]])

    def lessons(_):
        parts = (TensorDataset(part, torch.full((len(part),), -1)) for part in (x[32:], x[:32]))
        return TrainingData(*parts, labelled=False)

    def near(small):
        return -float((predict(small, [x[:32]]) - wanted).square().mean())

    labels = torch.arange(32) % 10
    return compare.Subject(model, lambda _: rivals.Seen(x[32:64].split(8), labels.split(8)), x[:2], near, lessons)


def test_every_method_keeps_within_its_limit(monkeypatch):
    half = [("macs", 0.5)]
    monkeypatch.setattr(compare, "_time", lambda *_: 0.5)
    mine = subject()
    found = list(compare.rows(mine, [], (0,), limits=half))
    assert [r.get("method", "original") for r in found] == ["original", *compare.METHODS]
    assert all(r["macs"] <= 0.5 for r in found[1:])
    assert found[0]["score"] == 0
    best = {r["method"]: r["score"] for r in found[1:]}
    assert max(best, key=best.get) in ("ghostify, auto and narrow", "ghostify, auto", "low rank")
    assert best["ghostify, depthwise"] > best["ghost, first filters kept"]
    assert list(compare.rows(mine, found, (0,), limits=half)) == found
    assert all(r["latency"] == 0.5 for r in found[1:])
    monkeypatch.setattr(compare, "METHODS", {"low rank": compare.METHODS["low rank"]})
    both = [*half, ("latency", 0.6)]
    *_, further = compare.rows(mine, found, (1,), limits=both)
    *_, untimed = compare.rows(mine, found[:1], (0,), untimed=True, limits=both)
    for row, seed in ((further, 1), (untimed, 0)):
        assert (row["how"], row["latency"]) == (f"low rank, macs 0.5, seed {seed}", None)
    assert f"| ghostify, auto with pruning | macs 0.5 | {100 * found[1]['macs']:.0f} | 50 |" in compare.comparison(
        found
    )


@pytest.mark.parametrize("method", [m for m in compare.METHODS if m.startswith("ghost")])
def test_a_limit_out_of_reach_gives_no_row(method):
    mine = subject()
    assert compare.METHODS[method](mine, mine.seen(0), ("macs", 0.01), 0) is None


@pytest.mark.parametrize("spoiled", [False, True])
def test_old_statistics_stay_where_they_answer_better(spoiled):
    torch.manual_seed(0)
    many, few = torch.randn(96, 1, 12, 12).split([64, 32])
    model, few = compare.networks.reestimated(settle(ResidualNet(8, 16)), [many]), rivals.Seen((few,))
    made = copy.deepcopy(model)
    if spoiled:
        made.load_state_dict({k: v * 9 if "running_var" in k else v for k, v in made.state_dict().items()})
    assert (compare.nearer(made, model, few) is made) is not spoiled
