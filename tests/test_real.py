"""The benchmark of real networks on a tiny one: its rows, that it resumes, and its table beside the bars."""

import copy
from types import SimpleNamespace

import pytest
import torch

from benchmarks.experiments import real
from benchmarks.lib import bars, demosaicking
from benchmarks.lib.agreement import agreement, right
from benchmarks.lib.smaller_input import smaller_input
from benchmarks.lib.subjects import Setting, Subject
from ghostify.cli.demo_network import ResidualNet
from ghostify.evaluation.metrics import predict
from tests.nets import settle

SHARE, IMAGES = 0.6, 16


@pytest.fixture
def tiny(monkeypatch):
    model = settle(ResidualNet(8, 16))
    x = torch.randn(64, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    labels = predict(model, [x[:32]]).argmax(1)
    subject = Subject(
        model,
        lambda count, seed: x[32:].roll(seed, 0)[:count].split(8),
        x[:32].split(16),
        agreement,
        lambda m: right(predict(m, [x[:32]]), labels),
    )
    monkeypatch.setattr(real, "SETTINGS", {"tiny": Setting(lambda _: subject, (SHARE,), (IMAGES,), 32, ("low rank",))})
    monkeypatch.setattr(real, "subject", lambda *_: subject)
    return subject


def use(monkeypatch, **methods):
    monkeypatch.setattr(real, "methods", lambda *_: methods)


def test_a_row_has_every_measure_and_is_skipped_when_it_is_there(tiny, monkeypatch):
    halved = copy.deepcopy(tiny.model)
    with torch.no_grad():
        halved.fc.weight.mul_(0.5)
    use(monkeypatch, ghostify=lambda *_: halved)
    todo = list(real.tasks(["tiny"], seeds=[0, 1]))
    original, *converted = real.rows(todo, set())
    assert (original["error"], original["agreement"], original["right"], original["drop"]) == (0, 100, 32, 0)
    assert [row["how"] for row in converted] == [
        f"tiny, ghostify, 0.6 of the MACs, 16 images, seed {seed}" for seed in (0, 1)
    ]
    with torch.no_grad():
        reference, outputs = (torch.cat([m(batch) for batch in tiny.test]) for m in (tiny.model, halved))
    spread = reference - reference.mean(0)
    assert converted[0]["error"] == pytest.approx(float(((outputs - reference) ** 2).sum() / (spread**2).sum()))
    assert 0 < converted[0]["calibration_error"] != converted[1]["calibration_error"]
    assert (converted[0]["share"], converted[0]["steps"], converted[0]["labels"]) == (1, 0, 0)
    *rest, last = real.rows(todo, {original["how"], converted[0]["how"]})
    assert not rest
    assert last["seed"] == 1


def test_a_method_that_cannot_has_no_row(tiny, monkeypatch):  # noqa: ARG001
    use(monkeypatch, ghostify=lambda *_: None)
    assert [row["method"] for row in real.rows(list(real.tasks(["tiny"])), set())] == ["original"]


def test_rows_are_chosen_by_method_and_number_of_images(tiny):  # noqa: ARG001
    chosen = list(real.tasks(["tiny"], only=["low rank"], images=[8], shares=[0.5], seeds=[3]))
    assert [task.how for task in chosen] == ["tiny, original", "tiny, low rank, 0.5 of the MACs, 8 images, seed 3"]
    assert {task.method for task in real.tasks(["tiny"], only=["ghostify"])} == {"original", "ghostify"}
    assert "Torch-Pruning, magnitude" not in {task.method for task in real.tasks(["tiny"])}


def test_healing_has_rows_where_ghostify_has_the_argument(monkeypatch):
    monkeypatch.setattr(real, "ghostify", lambda model, **_: model)
    assert bars.HEALED not in real.methods()
    monkeypatch.setattr(real, "ghostify", lambda model, heal=None: (model, heal))
    assert real.methods(7)[bars.HEALED].args[0] == {**real.AUTO, "heal": 7}


def test_what_the_report_says_is_in_the_row(tiny, monkeypatch):
    assert real.reported(tiny.model) == {"steps": 0}
    calibrated, fallen, sliced = ((0.1, 0.1), (None, 0.1), (None, None))
    layers = [SimpleNamespace(fit_error=fit, holdout_error=holdout) for fit, holdout in (calibrated, fallen, sliced)]
    forecast, healing = SimpleNamespace(error=0.2, agreement=80), SimpleNamespace(steps=9)
    told = SimpleNamespace(layers=layers, forecast=forecast, measured=None, healing=healing)
    monkeypatch.setattr(real, "report", lambda _: told)
    expected = {"forecast": 0.2, "forecast_agreement": 80, "measured": None, "measured_agreement": None}
    assert real.reported(tiny.model) == {**expected, "data_free": 1, "steps": 9}
    del told.forecast, told.healing
    assert real.reported(tiny.model) == {**dict.fromkeys(expected), "data_free": 1, "steps": 0}


def test_agreement_counts_confident_answers_and_the_best_five():
    reference = torch.zeros(3, 8)
    reference[0, 0], reference[1, 1], reference[2, 2] = 9, 9, 0.1
    outputs = torch.arange(8.0).repeat(3, 1)  # the best is 7, the best five are 3 to 7
    outputs[0, 0] = 10
    outputs[1, 1] = 4.5
    assert agreement(outputs, reference) == {
        "agreement": pytest.approx(100 / 3),
        "confident": 50,
        "top5": pytest.approx(200 / 3),
    }
    assert agreement(outputs[2:], reference[2:])["confident"] is None


@pytest.mark.parametrize(("side", "share", "size"), [(28, 0.25, 14), (28, 0.6, 21), (224, 0.75, 192), (28, 1, 28)])
def test_the_smaller_input_is_the_largest_that_costs_no_more(side, share, size):
    """The MACs of one convolution fall with the square of the size; sizes are multiples of the 28th part."""
    small = smaller_input(torch.nn.Conv2d(1, 2, 3, padding=1), torch.zeros(1, 1, side, side), share)
    assert small.size == size
    assert small(torch.zeros(1, 1, side, side)).shape == (1, 2, size, size)


def test_no_size_costs_nothing():
    assert smaller_input(torch.nn.Conv2d(1, 2, 3, padding=1), torch.zeros(1, 1, 28, 28), 0) is None


def row(share, images, **measures):
    return {"network": "MobileNetV2", "method": "ghostify", "limit": share, "images": images, **measures}


def test_bars_stand_beside_the_means_of_the_seeds():
    seeds = [row(0.875, 256, agreement=a, forecast=f, error=0.1) for a, f in ((79, 0.12), (83, 0.08))]
    healed = row(0.75, 1024, agreement=71.9, forecast=0.9, error=0.1, steps=5)
    table = bars.real([*seeds, healed])
    lines = [line for line in table.splitlines() if line.startswith("| MobileNetV2")]
    assert lines[0].endswith("| 45 | 67 | >= 80 | 81.0 ± 2.0 | yes |")
    assert lines[1].endswith("|  |  | >= 86 |  |  |")
    assert lines[3].endswith("| >= 72 | 71.9 | no |")
    assert "| <= 1.5 | 1.25 (2 rows) | yes |" in table
    assert "| ghostify | 256 | 2 | 81.0 ± 2.0 |" in table
    assert "low rank by SVD" in table


def test_a_loss_of_points_is_at_most_its_bar():
    bar = bars.Bar("ResNet-20", 0.25, 512, "drop", 0.5)
    assert [bar.is_met(value) for value in (0.4, 0.6)] == [True, False]


def test_the_demosaicking_network_has_dead_and_constant_filters():
    torch.manual_seed(0)
    model, colours = demosaicking.Demosaicker(), torch.rand(2, 3, 8, 8)
    demosaicking.silence(model)
    answers = model.correction[:2](torch.rand(2, 4, 4, 4))
    assert not answers[:, : demosaicking.DEAD].any()
    assert (answers[:, demosaicking.DEAD :][:, : demosaicking.CONSTANT] == 0.5).all()
    assert answers[:, demosaicking.DEAD + demosaicking.CONSTANT :].var((0, 2, 3)).median() > 0
    raw = demosaicking.mosaic(colours)
    nearest = model(raw)  # the last convolution starts at zero
    assert torch.equal(nearest[..., ::2, ::2][:, 0], colours[..., ::2, ::2][:, 0])
    assert torch.equal(nearest[..., 1::2, 1::2][:, 2], colours[..., 1::2, 1::2][:, 2])
    assert torch.equal(nearest[..., ::2, 1::2][:, 1], colours[..., ::2, 1::2][:, 1])


@pytest.mark.slow
def test_every_method_keeps_within_the_share(tiny, monkeypatch):
    rivals = tuple(method for method in real.methods() if not method.startswith("ghostify"))
    setting = real.SETTINGS["tiny"]
    monkeypatch.setattr(real, "SETTINGS", {"tiny": Setting(setting.build, (SHARE,), (IMAGES,), 32, rivals)})
    rows = list(real.rows(list(real.tasks(["tiny"], seeds=[0])), set(), heal=1))
    assert {r["method"] for r in rows} == {"original", *real.methods()}
    assert all(r["share"] <= SHARE and r["error"] > 0 for r in rows[1:])
    assert all(torch.equal(a, b) for a, b in zip(tiny.reference, tiny.run(tiny.model, tiny.test), strict=True))
