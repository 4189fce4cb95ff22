import sys

import pytest
import torch
from timm.layers import DropPath
from torch import fx, nn

from ghostify import ghostify, plan, trace
from ghostify.evaluation.metrics import predict, relative_error
from tests import nets


def residual_operands(model):
    return {r.conv.name: r.residual_operand for r in plan(trace(model)).rewrites}


def test_the_norm_and_the_residual_operand_are_identified():
    neighbours = {r.conv.name: (r.norm, r.residual_operand) for r in plan(trace(nets.settle(nets.Residual()))).rewrites}
    assert neighbours["conv1"] == ("bn1", None)
    assert neighbours["conv2"] == ("bn2", "stem_2")


class Sum(nn.Module):
    def __init__(self, add, *between):
        super().__init__()
        self.add = add
        self.first, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.between = nn.Sequential(*between)

    def forward(self, x):
        x = self.first(x)
        return self.add(self.between(self.conv(x)), x)


@pytest.mark.parametrize("add", [torch.add, lambda a, b: a + b, lambda a, b: a.add_(b), lambda a, b: b + a])
def test_all_forms_of_addition_have_a_residual_operand(add):
    assert residual_operands(nets.settle(Sum(add, nn.BatchNorm2d(8), DropPath(0.1))))["conv"] == "first"


def test_the_residual_operand_is_the_input_of_an_identity():
    class IdentityShortcut(Sum):
        def __init__(self):
            super().__init__(None)
            self.shortcut = nn.Identity()

        def forward(self, x):
            x = self.first(x)
            return self.conv(x) + self.shortcut(x)

    assert residual_operands(nets.settle(IdentityShortcut()))["conv"] == "first"


@pytest.mark.parametrize("between", [nn.ReLU(), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)])
def test_other_modules_before_the_sum_leave_no_residual_operand(between):
    assert residual_operands(nets.settle(Sum(torch.add, between)))["conv"] is None


def test_scaled_sums_have_no_residual_operand():
    assert residual_operands(Sum(lambda a, b: torch.add(a, b, alpha=2)))["conv"] is None


def test_the_last_branch_of_a_sum_compensates_the_error_of_the_other(monkeypatch):
    torch.manual_seed(0)

    class TwoBranches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nets.conv_norm(3, 8)
            self.left, self.right = (nets.conv_norm(8, 12)[:2] for _ in range(2))

        def forward(self, x):
            x = self.stem(x)
            return torch.relu(self.left(x) + self.right(x))

    model, x, test = nets.settle(TwoBranches()), nets.images(64, 16), nets.images(32, 16, seed=5)
    compensated = ghostify(model, cheap="pointwise", calibration=x)
    monkeypatch.setattr(sys.modules["ghostify.planning.planner"], "find_residual_operand", lambda *_: None)
    separate = ghostify(model, cheap="pointwise", calibration=x)
    expected = predict(model, [test])
    error = relative_error(predict(compensated, [test]), expected)
    assert error < 0.95 * relative_error(predict(separate, [test]), expected)


def test_modules_with_several_calls_have_no_neighbours():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), conv, nn.BatchNorm2d(8), conv)
    assert all(r.norm is None and r.residual_operand is None for r in plan(trace(model)).rewrites)
    assert isinstance(trace(model).module, fx.GraphModule)
