import json

import pytest
import torch

from ghostify import GhostifyError, Policy, Rule, ghostify, report, trace
from ghostify.evaluation.metrics import predict, relative_error
from ghostify.planning import cost
from ghostify.search.budget import plan_for_budget
from ghostify.search.pareto import frontier, plan_for_drop, read_frontier, write_frontier
from tests import nets

AUTO = Policy((Rule(cheap="auto"),))


def settled():
    return nets.settle(nets.Residual(16)), nets.images(16)


def likeness(model, x):
    """An evaluation: 100 for the original's own outputs, less by their relative error in percent."""
    expected = predict(model, [x])
    return lambda other: 100 * (1 - relative_error(predict(other, [x]), expected))


def test_the_curve_goes_from_the_original_down_to_what_is_within_reach():
    model, x = settled()
    program = trace(model, x[:1])
    curve = frontier(program, AUTO, calibration=x, points=5, evaluate=likeness(model, x))
    assert [len(p.shares) for p in curve] == [2] * 5
    macs, errors = [p.shares["macs"] for p in curve], [p.error for p in curve]
    assert macs == sorted(macs, reverse=True)
    assert errors == sorted(errors)
    assert (macs[0], errors[0], curve[0].drop) == (1, 0, 0)
    assert not curve[0].plan.rewrites
    assert all(p.plan.macs_after == round(p.shares["macs"] * program.macs) for p in curve)
    assert curve[-1].drop > curve[0].drop
    with pytest.raises(GhostifyError, match=f"the minimum is {macs[-1]:.2f}"):
        plan_for_budget(program, AUTO, {"macs": macs[-1] / 2}, x)


def test_a_point_of_the_curve_is_what_its_budget_gives():
    model, x = settled()
    program = trace(model, x[:1])
    point = frontier(program, AUTO, "params", x, points=4)[2]
    assert point.drop is None
    planned = plan_for_budget(program, AUTO, {"params": point.shares["params"] + 1e-6}, x)
    assert planned.forecast.error <= 1.5 * point.error  # other losses are measured
    layers = point.to_dict()["layers"]
    assert set(layers) == {e.conv.name for e in point.plan.rewrites}


@pytest.mark.parametrize("others", [{}, {"macs": 0.9}, {"params": 0.8, "macs": 0.9}])
def test_the_cheapest_model_within_a_drop(others):
    model, x = settled()
    score = likeness(model, x)
    converted = ghostify(
        model, cheap="auto", budget={"max_drop": 5, **others}, example_inputs=x[:1], calibration=x, evaluate=score
    )
    assert score(converted) >= 95
    summary = report(converted)
    assert summary.macs_after < others.get("macs", 1) * summary.macs_before
    assert cost.count_parameters(converted) <= others.get("params", 1) * cost.count_parameters(model)
    stricter = (
        ghostify(
            model, cheap="auto", budget={"max_drop": 0.1, **others}, example_inputs=x[:1], calibration=x, evaluate=score
        )
        if not others
        else None
    )
    assert stricter is None or (score(stricter) >= 99.9 and report(stricter).macs_after > summary.macs_after)


def test_a_limit_that_the_original_keeps_changes_nothing():
    model, x = settled()
    given = {"cheap": "auto", "example_inputs": x[:1], "calibration": x, "evaluate": likeness(model, x)}
    whole = trace(model, x[:1]).macs
    models = [ghostify(model, budget={"max_drop": 5, "macs": limit}, **given) for limit in (1.0, 3 * whole)]
    assert report(models[0]).macs_after == report(models[1]).macs_after < whole


def test_no_drop_at_all_leaves_the_model_as_it_is():
    model, x = settled()
    planned, fits = plan_for_drop(trace(model, x[:1]), AUTO, {"max_drop": 0}, likeness(model, x), x)
    assert not planned.rewrites
    assert not fits.weights


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"max_drop": 0.1, "macs": 0.5}, r"max_drop 0.1: is infeasible: at macs=0.5 the drop is \d"),
        ({"max_drop": -1}, "max_drop -1: is not a number of at least 0"),
        ({"max_drop": 1, "flops": 0.5}, "budget 'flops': is unknown"),
    ],
)
def test_drops_that_cannot_be(budget, message):
    model, x = settled()
    with pytest.raises(GhostifyError, match=message):
        plan_for_drop(trace(model, x[:1]), AUTO, budget, likeness(model, x), x)


def test_a_drop_needs_an_evaluation():
    model, x = settled()
    with pytest.raises(GhostifyError, match="Pass evaluate"):
        ghostify(model, cheap="auto", budget={"max_drop": 1}, example_inputs=x)


def test_the_curve_is_the_same_each_time():
    model, x = settled()
    first, second = (frontier(trace(model, x[:1]), AUTO, calibration=x, points=3) for _ in range(2))
    assert first == second
    assert all(torch.isfinite(torch.tensor(p.error)) for p in first)


@pytest.fixture
def pruned_curve():
    program = trace(nets.settle(nets.Inverted(16)), nets.images(1))
    return frontier(program, Policy((Rule(cheap="auto", prune=True),)), calibration=nets.images(16), points=3)


def test_a_frontier_is_read_as_it_was_written(pruned_curve, tmp_path):
    file = tmp_path / "frontier.json"
    write_frontier(pruned_curve, file)
    assert json.loads(file.read_text())["format"] == 2
    points = read_frontier(file)
    assert points == [point.to_dict() for point in pruned_curve]
    pruned = pruned_curve[-1].plan.pruned
    assert pruned
    for name, kept in pruned.items():
        layer = points[-1]["layers"][name]
        assert layer["kept_out_count"] == (None if kept.kept_out is None else len(kept.kept_out))
        assert layer["kept_in_count"] == (None if kept.kept_in is None else len(kept.kept_in))


@pytest.mark.parametrize("key", ["keeps", "makes"])
def test_a_frontier_of_format_1_is_read(key, tmp_path):
    file = tmp_path / "frontier.json"
    layout = {"outputs": 4, "intrinsic": 2, "width": 1, "dw_size": 3}
    layers = {"a": layout, "b": {**layout, key: [0, 1, 5], "reads": None}, "c": {key: None, "reads": [2, 3]}}
    file.write_text(json.dumps([{"shares": {"macs": 0.5}, "error": 0.1, "drop": None, "layers": layers}]))
    (point,) = read_frontier(file)
    assert (point["shares"], point["error"], point["drop"]) == ({"macs": 0.5}, 0.1, None)
    assert point["layers"] == {
        "a": layout,
        "b": {**layout, "kept_out_count": 3, "kept_in_count": None},
        "c": {"kept_out_count": None, "kept_in_count": 2},
    }


POINT = {"shares": {"macs": 0.5}, "error": 0.1, "drop": None, "layers": {"a": {}}}
WRONG = [
    {"shares": {}},
    {"shares": {"macs": "0.5"}},
    {"error": [1]},
    {"drop": "1"},
    {"layers": [1]},
    {"layers": {"a": 3}},
]


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{}", "3", '{"format": 3, "points": [1]}', '{"format": 2, "points": []}', "[3]"),
        *(json.dumps({"format": 2, "points": [{**POINT, **wrong}]}) for wrong in WRONG),
    ],
)
def test_other_files_are_no_frontiers(text, tmp_path):
    file = tmp_path / "frontier.json"
    file.write_text(text)
    with pytest.raises(GhostifyError, match=r"frontier\.json: is not a readable frontier"):
        read_frontier(file)


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), None, "good", [1.0], torch.zeros(2), True])
def test_an_evaluation_that_returns_no_number_is_refused(answer):
    program = trace(nets.settle(nets.Straight()), nets.images(1))
    with pytest.raises(GhostifyError, match=r"^evaluate: its result .*: is not a score\. Return a finite number"):
        frontier(program, Policy(), evaluate=lambda _: answer, points=1)


@pytest.mark.parametrize("answer", [1, torch.tensor(1.0), torch.ones(1, 1)])
def test_an_evaluation_may_return_one_number_in_any_form(answer):
    program = trace(nets.settle(nets.Straight()), nets.images(1))
    assert [p.drop for p in frontier(program, Policy(), evaluate=lambda _: answer, points=1)] == [0]
