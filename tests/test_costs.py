import pytest
import torch

from ghostify import Policy, Rule, fit, rewrite, trace
from ghostify.fitting.initialization import untrained_weights
from ghostify.planning.planner import PlanTarget, resolve_targets
from ghostify.search.budget import build_search_space, check_budget, select_plan
from ghostify.search.costs import COSTS, CountedCost, budget_help
from ghostify.timing.timer import LatencyTimer
from tests import nets


@pytest.mark.parametrize("name", ["macs", "params"])
@pytest.mark.parametrize("cheap", ["auto", "pointwise"])
def test_sums_over_layers_are_the_cost_of_the_model(name, cheap):
    program, timer = trace(nets.settle(nets.Residual(16)), nets.images(1)), LatencyTimer()
    space = build_search_space(program, Policy((Rule(cheap=cheap),)), (name,), None, 0, timer)
    selected = select_plan(space, {name: 0.8})
    module = rewrite(program, selected.plan, fit(program, selected.plan).weights)
    assert COSTS[name].share_of_model(program, module, timer) == pytest.approx(selected.shares[name])
    assert COSTS[name].share_of_model(program, program.module, timer) == 1


@pytest.mark.parametrize(("make", "is_exact"), [(nets.Classifier, True), (nets.DenselyConnected, False)])
def test_sums_over_pruned_layers_are_the_cost_of_the_model_or_an_upper_bound(make, is_exact):
    """Exact but where a layer reads several groups, of whose sum only some values are candidates."""
    program, timer, x = trace(nets.settle(make()), nets.images(1)), LatencyTimer(), nets.images(16)
    space = build_search_space(program, Policy((Rule(cheap="auto", prune=True),)), ("macs", "params"), x, 0, timer)
    selected = select_plan(space, {"params": 0.6, "macs": 0.7})
    module = rewrite(program, selected.plan, untrained_weights(program, selected.plan))
    for name in ("macs", "params"):
        share = COSTS[name].share_of_model(program, module, timer)
        assert share == pytest.approx(selected.shares[name]) if is_exact else share <= selected.shares[name]


def test_a_pruned_layer_costs_as_much_in_the_grid_as_on_its_own():
    program, timer = trace(nets.settle(nets.Straight(16)), nets.images(1)), LatencyTimer()
    targets = [t for t in resolve_targets(program, Policy()) if isinstance(t, PlanTarget)]
    conv, cost = targets[0].conv, COSTS["macs"]
    unpruned, *pruned = cost.of_pruned(program, conv, [(None, 2), (4, None), (4, 2)], timer)
    assert cost.of_pruned_grid(program, conv, unpruned, [None, 4], [None, 2], timer) == pruned
    assert cost.of_layouts(program, conv, [None], timer) == [unpruned]


def test_savings_of_latency_multiply(monkeypatch):
    program, timer = trace(nets.settle(nets.Straight(16)), nets.images(1)), LatencyTimer()
    conv = next(t.conv for t in resolve_targets(program, Policy()) if isinstance(t, PlanTarget))
    times = {(None, None): 8.0, (4, None): 4.0, (None, 2): 6.0}

    def pruned_latency(_conv, _info, kept_counts, _timer):
        return [8.0, *(times[counts] for counts in kept_counts)]

    monkeypatch.setattr("ghostify.search.costs.pruned_latency", pruned_latency)
    grid = COSTS["latency"].of_pruned_grid(program, conv, 16.0, [None, 4], [None, 2], timer)
    assert grid == [12.0, 8.0, 6.0]


def test_a_cost_in_the_table_can_be_budgeted(monkeypatch):
    """Nothing else has to know it: here each layer costs its number of intrinsic maps."""

    def maps(conv, layout):
        return conv.outputs if layout is None else layout.intrinsic

    def maps_of_model(module, _example):
        return sum(m.out_channels for m in module.modules() if isinstance(m, torch.nn.Conv2d))

    program = trace(nets.settle(nets.Straight(16)), nets.images(1))
    entry = CountedCost("maps", "feature maps", lambda p: maps_of_model(p.module, None), maps_of_model, maps)
    monkeypatch.setitem(COSTS, "maps", entry)
    check_budget({"maps": 0.5})
    assert "maps=0.5 (feature maps)" in budget_help()
    space = build_search_space(program, Policy((Rule(cheap="pointwise"),)), ("maps",), None, 0, LatencyTimer())
    selected = select_plan(space, {"maps": 0.7})
    kept = sum(r.layout.intrinsic for r in selected.plan.rewrites) + sum(s.conv.outputs for s in selected.plan.skips)
    assert kept == pytest.approx(selected.shares["maps"] * space.totals["maps"])
    assert kept <= 0.7 * space.totals["maps"]
