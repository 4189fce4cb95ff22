import re
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from ghostify import GhostifyError, Policy, Rule, deploy, fit, ghostify, load, report, rewrite, save, trace
from ghostify.evaluation.metrics import predict, relative_error
from ghostify.planning import cost
from ghostify.planning.planner import resolve_targets
from ghostify.pruning.pruning_groups import PruningGroup, find_pruning_groups
from ghostify.search.budget import plan_for_budget, select_plan
from ghostify.search.candidates import Candidate
from ghostify.search.search_space import SearchSpace, build_search_space
from ghostify.timing.timer import LatencyTimer
from tests import nets


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("cheap", ["auto", "pointwise", "depthwise"])
@pytest.mark.parametrize("make", [nets.Straight, nets.Residual, nets.Branches, nets.Shared])
def test_budgets_are_kept_and_used(make, cheap, calibrated):
    model, x = nets.settle(make(16)), nets.images(16)
    before = cost.count_macs(model, x[:1])
    for share in (0.7, 0.8):
        converted = ghostify(
            model, cheap=cheap, budget={"macs": share}, example_inputs=x[:1], calibration=x if calibrated else None
        )
        after = cost.count_macs(converted, x[:1])
        assert after == report(converted).macs_after
        assert (share - 0.2) * before < after <= share * before


def test_parameters_too():
    model, x = nets.settle(nets.Straight()), nets.images(4)
    budget = {"params": 0.7, "macs": 0.9}
    converted = ghostify(model, cheap="auto", budget=budget, example_inputs=x, calibration=x)
    assert cost.count_parameters(converted) <= 0.7 * cost.count_parameters(model)
    assert cost.count_macs(converted, x) <= 0.9 * cost.count_macs(model, x)


def test_the_planned_ratios_beat_one_for_all():
    torch.manual_seed(0)
    model, x, test = nets.settle(nets.Straight(16)), nets.images(64, 16), nets.images(32, 16, seed=4)
    model.a[0].weight.data[8:] = torch.einsum("ij,jchw->ichw", torch.randn(24, 8), model.a[0].weight.data[:8])
    uniform = ghostify(model, 2, cheap="pointwise", example_inputs=x[:1], calibration=x)
    share = report(uniform).macs_after / report(uniform).macs_before
    planned = ghostify(model, cheap="auto", budget={"macs": share}, example_inputs=x[:1], calibration=x)
    layers = {layer.name: layer for layer in report(planned).layers}
    assert layers["a.0"].intrinsic == 8
    expected = predict(model, [test])
    assert relative_error(predict(planned, [test]), expected) < relative_error(predict(uniform, [test]), expected)


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ({"macs": 0.01}, {}, r"budget macs 0.01: is infeasible: the minimum is 0\.\d+ .*Raise it to at least 0\.\d+"),
        ({"flops": 0.5}, {}, r"budget 'flops': is unknown\. Use macs, params, latency"),
        ({"macs": -1}, {}, "budget macs -1: is not a positive number"),
        ({"macs": "half"}, {}, "budget macs 'half': is not a positive number"),
        ({"macs": 0.5}, {"cheap": 2}, "cheap 2: does not work with a budget. Use auto"),
    ],
)
def test_budgets_that_cannot_be(budget, options, message):
    with pytest.raises(GhostifyError, match=message):
        ghostify(
            nets.settle(nets.Straight()), budget=budget, example_inputs=nets.images(1), **{"cheap": "auto", **options}
        )


def test_what_a_budget_needs():
    model = nets.settle(nets.Straight())
    with pytest.raises(GhostifyError, match=r"budget: needs the model's shapes\. Pass example_inputs"):
        ghostify(model, budget={"macs": 0.5})
    with pytest.raises(GhostifyError, match="cheap 'auto': needs a budget"):
        ghostify(model, cheap="auto")
    with pytest.raises(GhostifyError, match="budget: is empty"):
        plan_for_budget(trace(model, nets.images(1)), Policy(), {})
    with pytest.raises(GhostifyError, match="max_drop: needs fitted models"):
        plan_for_budget(trace(model, nets.images(1)), Policy(), {"max_drop": 1})


def test_what_is_reachable_can_be_reached():
    program = trace(nets.settle(nets.Straight()), nets.images(1))
    policy = Policy((Rule(cheap="auto"),))
    with pytest.raises(GhostifyError) as error:
        plan_for_budget(program, policy, {"macs": 0.01})
    share = float(re.search(r"the minimum is ([\d.]+) of", str(error.value))[1])
    assert plan_for_budget(program, policy, {"macs": share}).macs_after <= share * program.macs


def test_planning_a_model_in_training_mode_leaves_its_statistics_alone():
    model, x = nets.settle(nets.Straight()), nets.images(16)
    policy = Policy((Rule(cheap="auto"),))
    program = trace(model.train(), x[:1])
    before = {k: v.clone() for k, v in program.module.state_dict().items()}
    planned = plan_for_budget(program, policy, {"macs": 0.7}, x)
    assert all(torch.equal(v, before[k]) for k, v in program.module.state_dict().items())
    assert program.module.training
    assert planned == plan_for_budget(trace(model.eval(), x[:1]), policy, {"macs": 0.7}, x)


@pytest.fixture
def fake_timer(monkeypatch, tmp_path):
    """A timer that counts multiply-accumulates. It adds `overhead` to all but single convolutions; complete models take
    `whole` times the sum of their layers."""

    class FakeTimer:
        overhead, whole = 0.0, 1.0

    def latencies_ms(_, models, examples, _rounds=0):
        convs = [sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) for model in models]
        macs = [float(cost.count_macs(m, x)) for m, x in zip(models, examples, strict=True)]
        if min(convs) > 3:
            return [macs[0], *(FakeTimer.whole * latency for latency in macs[1:])]
        return [latency + FakeTimer.overhead * (count > 1) for latency, count in zip(macs, convs, strict=True)]

    monkeypatch.setattr(LatencyTimer, "latencies_ms", latencies_ms)
    monkeypatch.setenv("GHOSTIFY_CACHE", str(tmp_path))
    return FakeTimer


def timed(share, **more):
    program = trace(nets.settle(nets.Residual(32)), nets.images(2))
    return program, plan_for_budget(program, Policy((Rule(cheap="auto"),)), {"latency": share, **more})


@pytest.mark.usefixtures("fake_timer")
def test_a_latency_budget_is_kept_by_measured_time():
    program, planned = timed(0.6)
    assert 0.4 * program.macs < planned.macs_after <= 0.6 * program.macs
    assert len(planned.rewrites) > 0


def test_no_layer_is_rewritten_that_does_not_get_faster(fake_timer):
    fake_timer.overhead = 1e12
    with pytest.raises(GhostifyError, match=r"budget latency 0.6: is infeasible: the minimum is 1 "):
        timed(0.6)
    _, planned = timed(1.0)
    assert not planned.rewrites


def test_the_plan_is_revised_where_the_layers_do_not_add_up(fake_timer):
    fake_timer.whole = 1.2
    program, planned = timed(0.6)
    assert planned.macs_after <= 1.01 * 0.6 / 1.2 * program.macs
    fake_timer.whole = 5.0
    with pytest.raises(GhostifyError, match=r"latency 0.6: is infeasible: .* the complete model takes"):
        timed(0.6)


@pytest.mark.usefixtures("fake_timer")
def test_latency_goes_together_with_other_budgets():
    program, planned = timed(0.9, macs=0.5)
    assert planned.macs_after <= 0.5 * program.macs


def test_maps_are_left_out_within_a_budget():
    model, x = nets.settle(nets.Inverted(16)), nets.images(32)
    options = {"cheap": "auto", "budget": {"macs": 0.6}, "example_inputs": x[:1], "calibration": x.split(8)}
    converted = ghostify(model, prune=True, **options)
    layers = {layer.name: layer for layer in report(converted).layers}
    expand, between, project = (layers[name] for name in ("expand.0", "depthwise.0", "project.0"))
    assert expand.is_pruned
    assert (
        expand.intrinsic == between.kept_in_count == between.intrinsic == project.kept_in_count < expand.weight_shape[0]
    )
    assert cost.count_macs(converted, x[:1]) == report(converted).macs_after <= 0.6 * cost.count_macs(model, x[:1])
    unpruned = ghostify(model, **options)
    expected = predict(model, [x])
    assert relative_error(predict(converted, [x]), expected) < relative_error(predict(unpruned, [x]), expected)


def test_ghosts_and_fewer_maps_meet_in_one_layer(tmp_path):
    model, x = nets.settle(nets.Straight(32)), nets.images(64)
    options = {"cheap": "auto", "budget": {"macs": 0.3}, "example_inputs": x[:1], "calibration": x.split(16)}
    converted = ghostify(model, prune=True, **options)
    pruned_ghosts = [layer for layer in report(converted).layers if layer.kept_in_count is not None and layer.width]
    assert pruned_ghosts
    for layer in pruned_ghosts:
        ghost = converted.get_submodule(layer.name)
        assert ghost.primary_conv.in_channels == layer.kept_in_count
        assert ghost.primary_conv.out_channels == layer.intrinsic
        assert len(layer.channels) == layer.outputs
        assert set(layer.channels) <= set(range(layer.weight_shape[0]))
    assert cost.count_macs(converted, x[:1]) == report(converted).macs_after <= 0.3 * cost.count_macs(model, x[:1])
    assert relative_error(predict(converted, [x]), predict(model, [x])) < 0.25
    again = load(save(converted, tmp_path / "out"))
    assert torch.equal(again(x), converted(x))
    assert report(again) == report(converted)
    torch.testing.assert_close(deploy(converted, x[:1])(x), converted(x), atol=1e-4, rtol=1e-3)


def test_residual_streams_are_pruned_where_that_loses_least(monkeypatch):
    model, x, test = nets.settle(nets.Residual(16)), nets.images(64), nets.images(64, seed=9)
    options = {"targets": "*", "prune": True, "cheap": "auto", "budget": {"macs": 0.35}, "calibration": x.split(16)}
    converted = ghostify(model, example_inputs=x[:1], **options)
    layers = {layer.name: layer for layer in report(converted).layers}
    kept = layers["stem.0"].outputs
    assert kept == layers["conv2"].outputs == layers["conv1"].kept_in_count == layers["head"].kept_in_count < 16
    assert converted.get_submodule("bn2").num_features == len(converted.get_submodule("stem.1").running_var) == kept
    assert cost.count_macs(converted, x[:1]) == report(converted).macs_after <= 0.35 * cost.count_macs(model, x[:1])
    torch.testing.assert_close(deploy(converted, x[:1])(x), converted(x), atol=1e-4, rtol=1e-3)
    space_module = sys.modules["ghostify.search.search_space"]
    groups = [g for g in find_pruning_groups(trace(model, x[:1])) if isinstance(g, PruningGroup)]
    monkeypatch.setattr(space_module, "find_pruning_groups", lambda _: [g for g in groups if not g.channels.residual])
    other = ghostify(model, example_inputs=x[:1], **options)
    expected = predict(model, [test])
    assert relative_error(predict(converted, [test]), expected) < relative_error(predict(other, [test]), expected)


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.PixelShuffle(2)),
            ["0: no rule allows pruning 0", "1: 2 may"],
        ),
        (nets.Shared(), ["stem.0: again is called several times"]),
    ],
)
def test_the_report_says_why_nothing_can_be_pruned(model, reasons):
    x = nets.images(16)
    options = {"prune": True, "cheap": "auto", "budget": {"macs": 0.9}, "example_inputs": x[:1], "calibration": x}
    note = report(ghostify(nets.settle(model), **options)).notes[0]
    assert note.startswith("no channel group can be pruned; channels of ")
    assert all(reason in note for reason in reasons)


def test_pruning_needs_a_budget_and_images():
    model, x = nets.settle(nets.Inverted()), nets.images(4)
    with pytest.raises(GhostifyError, match="prune: needs a budget"):
        ghostify(model, prune=True)
    with pytest.raises(GhostifyError, match=r"prune: needs calibration images\. Pass calibration"):
        ghostify(model, prune=True, cheap="auto", budget={"macs": 0.5}, example_inputs=x)


def test_what_is_reachable_with_fewer_maps_can_be_reached():
    program, x = trace(nets.settle(nets.Inverted()), nets.images(1)), nets.images(16)
    policy = Policy((Rule(cheap="auto", prune=True),))
    with pytest.raises(GhostifyError) as error:
        plan_for_budget(program, policy, {"macs": 0.01}, x)
    share = float(re.search(r"the minimum is ([\d.]+) of", str(error.value))[1])
    assert plan_for_budget(program, policy, {"macs": share}, x).macs_after <= share * program.macs


@pytest.mark.parametrize("make", [nets.Inverted, nets.Straight])
def test_parameters_of_norms_go_with_their_maps(make):
    model, x = nets.settle(make(16)), nets.images(32)
    program = trace(model, x[:1])
    for options in ({"prune": True}, {"activated": True, "cheap": "depthwise"}):
        space = build_search_space(
            program, Policy((Rule(**{"cheap": "auto", **options}),)), ("params",), x, 0, LatencyTimer()
        )
        selected = select_plan(space, {"params": (1 + space.minimum_shares["params"]) / 2})
        converted = rewrite(program, selected.plan, fit(program, selected.plan, x).weights)
        predicted, actual = selected.shares["params"] * cost.count_parameters(model), cost.count_parameters(converted)
        assert actual <= predicted + 0.5
        assert "activated" in options or actual == pytest.approx(predicted)


@pytest.mark.usefixtures("fake_timer")
def test_fewer_maps_are_timed_layer_by_layer():
    program, x = trace(nets.settle(nets.Inverted(32)), nets.images(2)), nets.images(16)
    planned = plan_for_budget(program, Policy((Rule(cheap="auto", prune=True),)), {"latency": 0.6}, x)
    assert planned.pruned
    assert planned.macs_after <= 0.6 * program.macs


def chain(*widths):
    return nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))).eval()


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("rule", "form"),
    [
        ({"ratio": 4}, (4, 1, 3)),
        ({"ratio": 4, "dw_size": 5}, (4, 1, 5)),
        ({"ratio": 4, "cheap": "pointwise"}, (4, 4, 1)),
        ({"ratio": 4, "cheap": 2}, (4, 2, 3)),
    ],
)
def test_a_ratio_of_a_rule_holds_and_the_rest_is_planned_around_it(rule, form, calibrated):
    model, x = chain(3, 16, 16, 16, 16), nets.images(8)
    policy = Policy((Rule("1", **rule), Rule(cheap="auto")))
    options = {"example_inputs": x[:1], "calibration": x if calibrated else None}
    for share in (0.7, 0.8):
        converted = ghostify(model, policy=policy, budget={"macs": share}, **options)
        layers = report(converted).layers
        assert (layers[1].intrinsic, layers[1].width, layers[1].dw_size) == form
        assert (share - 0.1) < cost.count_macs(converted, x[:1]) / cost.count_macs(model, x[:1]) <= share


def test_an_automatic_form_at_a_ratio_is_the_one_of_least_error():
    model, x = chain(3, 16, 16, 16), nets.images(16)
    policy = Policy((Rule("1", ratio=2, cheap="auto"), Rule(cheap="auto")))
    layers = report(ghostify(model, policy=policy, budget={"macs": 0.9}, example_inputs=x, calibration=x)).layers
    assert (layers[1].intrinsic, layers[1].width, layers[1].dw_size) == (8, 8, 1)


def test_a_ratio_that_leaves_no_ghosts_keeps_the_layer_with_its_reason():
    model, x = chain(3, 16, 16, 1, 16, 16), nets.images(8)
    policy = Policy((Rule("1", ratio=1), Rule("2", ratio=2), Rule("3", ratio=1.2, dw_size=5), Rule(cheap="auto")))
    layers = report(ghostify(model, policy=policy, budget={"macs": 0.8}, example_inputs=x)).layers
    reasons = [layer.skip_reason for layer in layers[1:4]]
    assert reasons == [
        "ratio 1",
        "no ghost maps at ratio 2: 1 output",
        "no MACs saved: 144 per output position before, 176 after",
    ]
    assert layers[4].skip_reason is None


def test_a_budget_that_fixed_ratios_do_not_allow_names_what_they_do():
    model, x = chain(3, 16, 16, 16), nets.images(8)
    policy = Policy((Rule("1", ratio=1.5), Rule("2", ratio=1)))
    with pytest.raises(GhostifyError, match=r"budget macs 0.5: is infeasible: the minimum is 0\.\d+"):
        ghostify(model, policy=policy, budget={"macs": 0.5}, example_inputs=x)
    with pytest.raises(GhostifyError, match=r"cheap 2: does not work with a budget.*, or give its rule a ratio"):
        ghostify(model, policy=Policy((Rule(cheap=2),)), budget={"macs": 0.5}, example_inputs=x)


def test_limits_that_are_infeasible_together_name_the_minimum_of_each():
    """The only layer may save either of two costs; the rest of the model costs 1 of 4 of each."""
    program = trace(chain(3, 16), nets.images(1))
    either = [Candidate(None, (1.0, 3.0), 0.0), Candidate(None, (3.0, 1.0), 0.0)]
    targets, totals = resolve_targets(program, Policy(keep_first=False)), {"macs": 4.0, "params": 4.0}
    space = SearchSpace(program, tuple(targets), (either,), totals, ((3.0, 3.0),), LatencyTimer("eager"))
    assert space.minimum_shares == {"macs": 0.5, "params": 0.5}
    with pytest.raises(GhostifyError, match=r"infeasible together; the minimum of each, .* is macs 0\.5, params 0\.5"):
        select_plan(space, {"macs": 0.6, "params": 0.6})


def test_channels_of_a_layer_with_a_fixed_ratio_stay_or_keep_the_ratio():
    model, x = nets.settle(nets.Straight(16)), nets.images(32)
    policy = Policy((Rule("a.0", ratio=2, cheap="pointwise", prune=True), Rule(cheap="auto", prune=True)))
    converted = ghostify(model, policy=policy, budget={"macs": 0.4}, example_inputs=x[:1], calibration=x)
    layer = next(layer for layer in report(converted).layers if layer.name == "a.0")
    assert layer.intrinsic == -(-layer.outputs // 2)
    assert cost.count_macs(converted, x[:1]) <= 0.4 * cost.count_macs(model, x[:1])


@pytest.mark.usefixtures("fake_timer")
def test_a_fixed_ratio_holds_under_a_latency_budget():
    model, x = nets.settle(nets.Straight(64)), nets.images(2)
    policy = Policy((Rule("a.0", ratio=4), Rule(cheap="auto")))
    planned = plan_for_budget(trace(model, x), policy, {"latency": 0.98})
    assert next(e for e in planned.rewrites if e.conv.name == "a.0").layout.intrinsic == 32


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("value", [1e19, 1e20])
def test_values_near_overflow_are_an_error(value, prune):
    model, x = nets.settle(nets.Straight()), torch.full((4, 3, 12, 12), value)
    with pytest.raises(GhostifyError, match=r"^calibration.* 0.* not finite"):
        ghostify(model, cheap="auto", prune=prune, budget={"macs": 0.8}, example_inputs=x, calibration=[x])


def test_a_wrong_batch_is_named():
    model, x = nets.settle(nets.Straight()), nets.images(4)
    with pytest.raises(GhostifyError, match=r"^calibration batch 1: the model does not run on it"):
        ghostify(model, cheap="auto", budget={"macs": 0.8}, example_inputs=x, calibration=[x, x[:, :2]])
