import sys

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from ghostify import ghostify, plan, report, trace
from ghostify.modules.ghost import GhostModule
from tests import nets


def absorbers(model):
    return {r.conv.name: r.permutation_target for r in plan(trace(model)).rewrites}


def test_a_straight_line_takes_up_the_order():
    model = nets.settle(nets.Straight())
    found = absorbers(model)
    assert {member.path.rpartition(".")[0] for member in found["a.0"].parameters} == {"a.1"}
    assert [member.path for member in found["a.0"].consumers] == ["b.0"]
    assert found["b.0"] is None
    converted = ghostify(model, calibration=nets.images())
    assert converted.get_submodule("a.0").order is None


@pytest.mark.parametrize(
    "between",
    [
        [nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)],
        [BatchNormAct2d(8)],
        [nn.Identity(), nn.SiLU(), nn.AdaptiveAvgPool2d(3)],
    ],
)
def test_what_treats_channels_alike_passes_the_order_on(between):
    model = nets.settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), *between, nn.Conv2d(8, 4, 1)))
    assert absorbers(model)["1"].consumers[0].path == str(len(model) - 1)


@pytest.mark.parametrize(
    "between",
    [[nn.GroupNorm(2, 8)], [nn.PReLU(8)], [nn.Softmax(1)], [nn.Conv2d(8, 8, 3, groups=8)], [nn.PixelShuffle(2)]],
)
def test_what_does_not_is_where_the_gather_stays(between):
    outputs = 2 if isinstance(between[0], nn.PixelShuffle) else 8
    model = nets.settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), *between, nn.Conv2d(outputs, 4, 1)))
    assert absorbers(model)["1"] is None


def test_whoever_looks_on_sees_the_original_order():
    model = nets.settle(nets.Straight())
    model.a[2].register_forward_hook(lambda *_: None)
    made = ghostify(model, 2)
    assert made.get_submodule("a.0").order is not None


def test_whoever_looks_on_inside_a_norm_does_too():
    model = nets.settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 4, 1)))
    assert absorbers(model)["1"] is not None
    model[2].act.register_forward_hook(lambda *_: None)
    assert absorbers(model)["1"] is None


def test_a_shared_norm_or_consumer_does_not_absorb():
    norm, last = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), norm, nn.Conv2d(8, 8, 3), norm)
    assert absorbers(nets.settle(model))["1"] is None
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), last, last)
    assert absorbers(nets.settle(model))["1"] is None


@pytest.mark.parametrize("make", nets.ALL, ids=lambda c: c.__name__)
def test_absorbing_changes_no_answer(make, monkeypatch):
    model, x = nets.settle(make()), nets.images()
    absorbed = ghostify(model, calibration=x)
    monkeypatch.setattr(sys.modules["ghostify.rewriting.apply"], "push_permutation", lambda *_: None)
    gathered = ghostify(model, calibration=x)
    torch.testing.assert_close(absorbed(x), gathered(x), rtol=1e-4, atol=1e-5)


def test_the_report_says_where_a_gather_remains():
    converted = ghostify(nets.settle(nets.Residual()), calibration=nets.images())
    gathers = {line.name: line.reorders_output for line in report(converted).layers if line.skip_reason is None}
    ghosts = {n: m.order is not None for n, m in converted.named_modules() if isinstance(m, GhostModule)}
    assert gathers == ghosts
