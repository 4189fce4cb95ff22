import pytest
import torch
from torch import nn

from ghostify import GhostifyError, Policy, Rule, ghostify, plan, trace
from ghostify.planning.planner import GhostRewrite, Skip
from tests import nets


def reasons(model, policy=None):
    return {s.conv.name: s.reason for s in plan(trace(model), policy).skips}


def test_every_convolution_is_in_the_plan_exactly_once():
    for make in nets.ALL:
        program = trace(nets.settle(make()))
        entries = plan(program).entries
        assert [e.conv.name for e in entries] == [c.name for c in program.convolutions]
        assert all(isinstance(e, GhostRewrite) != isinstance(e, Skip) for e in entries)


def test_reasons_for_leaving_a_convolution_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 1, 3),
        nn.Conv2d(1, 8, 3),
        nn.Conv2d(8, 8, 3),
    )
    rules = (Rule("5", ratio=1), Rule(("0", "1", "2", "3", "4", "6"), ignore="6"))
    skipped = reasons(model, Policy(rules))
    assert skipped["0"] == "first convolution (keep_first)"
    assert skipped["1"] == "depthwise convolution"
    assert skipped["2"] == "grouped convolution: 2 groups"
    assert skipped["3"] == "no MACs saved: 64 per output position before, 68 after"
    assert skipped["4"] == "no ghost maps at ratio 2: 1 output"
    assert skipped["5"] == "ratio 1"
    assert skipped["6"] == "ignored by its rule"
    assert reasons(model, Policy((Rule("6"),)))["5"] == "not targeted by any rule"


def test_the_first_rule_that_matches_decides_the_ratio():
    model = nets.settle(nets.Straight())
    policy = Policy((Rule("a.*", ratio=4), Rule(ratio=2, dw_size=5)))
    layouts = {r.conv.name: r.layout for r in plan(trace(model), policy).rewrites}
    assert (layouts["a.0"].intrinsic, layouts["a.0"].kernel_size) == (4, 3)
    assert (layouts["b.0"].intrinsic, layouts["b.0"].kernel_size) == (8, 5)


@pytest.mark.parametrize("key", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_an_error(key):
    program = trace(nets.settle(nets.Straight()))
    with pytest.raises(GhostifyError, match=f"{key} 'layer9': matches no convolution of Straight. Choose from stem.0"):
        plan(program, Policy((Rule(**{key: "layer9"}),)))


def test_totals_need_shapes():
    model = nets.settle(nets.Straight())
    assert plan(trace(model)).macs_after is None
    known = plan(trace(model, torch.zeros(1, 3, 12, 12)))
    assert 0 < known.macs_after < known.macs_before


def test_planning_two_thousand_convolutions_takes_seconds():
    model = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(2000)])
    assert len(plan(trace(model)).rewrites) == 1999


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)),
            "Most are skipped for: depthwise convolution",
        ),
        (nn.Sequential(nn.Linear(3, 3)), "contains no two-dimensional convolution"),
    ],
)
def test_a_conversion_that_changes_nothing_warns_once(model, reason):
    with pytest.warns(UserWarning, match=reason) as warned:
        ghostify(model.eval())
    assert len(warned) == 1
    ghostify(model, 1)
