import pytest
import torch

from ghostify import GhostifyError, Policy, Rule, plan_for_budget, trace
from ghostify.planning import cost
from ghostify.planning.planner import resolve_targets
from ghostify.search.untouched import find_untouched
from tests import nets


class WideStem(torch.nn.Module):
    """Most MACs are in the first convolution, on large maps."""

    def __init__(self):
        super().__init__()
        self.stem, self.a = torch.nn.Conv2d(3, 32, 5), torch.nn.Conv2d(32, 16, 3, stride=4)

    def forward(self, x):
        return self.a(torch.relu(self.stem(x)))


def test_what_the_first_convolution_keeps_is_said_and_what_it_would_save():
    program = trace(WideStem().eval(), nets.images(1, 20))
    stem = cost.conv_macs(program.convolutions[0]) * 16 * 16 / program.macs
    (untouched,) = find_untouched(program, resolve_targets(program, Policy())[:1])
    assert (untouched.names, untouched.share) == (("stem",), pytest.approx(stem))
    # 4 of 32 filters of 75 values, and 28 ghosts of 4 maps
    assert untouched.gain == pytest.approx(stem * (1 - (4 * 75 + 28 * 4) / (32 * 75)))
    wanted = (
        f"first convolution (keep_first): stem keeps {100 * stem:.0f} % of the MACs; to save up to "
        f"{100 * untouched.gain:.0f} % there, pass targets='*' (--target '*', or keep_first = false in a policy)"
    )
    assert str(untouched) == wanted
    assert wanted in plan_for_budget(program, Policy((Rule(cheap="pointwise"),)), {"macs": 0.9}).notes
    with pytest.raises(
        GhostifyError, match=r"Raise it to at least 0\.\d+, or target more layers\. The first conv"
    ) as error:
        plan_for_budget(program, Policy((Rule(cheap="pointwise"),)), {"macs": 0.3})
    assert str(error.value).endswith(f"The {wanted}.")
    allowed = plan_for_budget(program, Policy((Rule(cheap="pointwise"),), keep_first=False), {"macs": 0.3})
    assert allowed.notes == ()


def test_convolutions_that_no_rule_can_change_have_no_remedy_and_those_of_few_macs_no_note():
    program = trace(nets.settle(nets.Inverted()), nets.images(1))
    all_untouched = find_untouched(program, [s for s in resolve_targets(program, Policy()) if hasattr(s, "reason")])
    by_reason = {untouched.reason: untouched for untouched in all_untouched}
    assert by_reason["depthwise convolution"].gain == 0
    assert str(by_reason["depthwise convolution"]).endswith("% of the MACs")
    ignoring = resolve_targets(program, Policy(Rule(ignore=("expand.0", "project.0"))))
    ignored = next(u for u in find_untouched(program, [s for s in ignoring if hasattr(s, "reason")]) if u.gain > 0.1)
    assert str(ignored).startswith("ignored by its rule: expand.0, project.0 keep")
    assert str(ignored).endswith("there, shorten ignore")
