import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ghostify import Policy, Rule, ghostify, plan, report, trace
from ghostify.planning import cost
from tests import nets


@pytest.mark.parametrize("cheap", ["depthwise", "pointwise", 2])
@pytest.mark.parametrize("ratio", [1.5, 2, 3])
@pytest.mark.parametrize("make", nets.ALL, ids=lambda c: c.__name__)
def test_the_plans_macs_are_what_torch_counts(make, ratio, cheap):
    model, x = nets.settle(make()), nets.images(2)
    converted = ghostify(model, ratio, cheap=cheap, example_inputs=x)
    with FlopCounterMode(display=False) as counter:
        converted(x)
    assert report(converted).macs_after == counter.get_total_flops() // 2 == cost.count_macs(converted, x)


def test_macs_by_hand():
    program = trace(nets.settle(nets.Straight()), nets.images(1))
    planned = plan(program, Policy((Rule(ratio=3, dw_size=5),)))
    a = planned.rewrites[0]
    assert a.macs_before == 16 * 8 * 9
    assert a.macs_after == 6 * 8 * 9 + 10 * 25
    assert planned.macs_before - planned.macs_after == sum(
        (r.macs_before - r.macs_after) * r.conv.calls[0].output_shape[2] ** 2 for r in planned.rewrites
    )


def test_counting_keeps_modes_and_random_state():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()).train()
    model[1].eval()
    state = torch.get_rng_state()
    assert cost.count_macs(model, torch.zeros(1, 3, 5, 5)) == 9 * 4 * 27
    assert (model.training, model[1].training) == (True, False)
    assert torch.equal(torch.get_rng_state(), state)
