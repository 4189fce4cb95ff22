import sys

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from ghostify import ghostify, plan, report, trace
from ghostify.modules.ghost import GhostModule
from tests import nets


def permutation_targets(model):
    return {r.conv.name: r.permutation_target for r in plan(trace(model)).rewrites}


def test_the_next_convolution_of_a_chain_is_the_target():
    model = nets.settle(nets.Straight())
    targets = permutation_targets(model)
    assert {member.path.rpartition(".")[0] for member in targets["a.0"].parameters} == {"a.1"}
    assert [member.path for member in targets["a.0"].consumers] == ["b.0"]
    assert targets["b.0"] is None
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
def test_channel_independent_operators_pass_the_order_on(between):
    model = nets.settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), *between, nn.Conv2d(8, 4, 1)))
    assert permutation_targets(model)["1"].consumers[0].path == str(len(model) - 1)


@pytest.mark.parametrize(
    "between",
    [[nn.GroupNorm(2, 8)], [nn.PReLU(8)], [nn.Softmax(1)], [nn.Conv2d(8, 8, 3, groups=8)], [nn.PixelShuffle(2)]],
)
def test_other_operators_need_the_original_order(between):
    outputs = 2 if isinstance(between[0], nn.PixelShuffle) else 8
    model = nets.settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), *between, nn.Conv2d(outputs, 4, 1)))
    assert permutation_targets(model)["1"] is None


def test_hooks_need_the_original_order():
    model = nets.settle(nets.Straight())
    model.a[2].register_forward_hook(lambda *_: None)
    converted = ghostify(model, 2)
    assert converted.get_submodule("a.0").order is not None


def test_hooks_inside_a_norm_need_the_original_order():
    model = nets.settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 4, 1)))
    assert permutation_targets(model)["1"] is not None
    model[2].act.register_forward_hook(lambda *_: None)
    assert permutation_targets(model)["1"] is None


def test_a_shared_norm_or_consumer_is_not_a_target():
    norm, last = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), norm, nn.Conv2d(8, 8, 3), norm)
    assert permutation_targets(nets.settle(model))["1"] is None
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), last, last)
    assert permutation_targets(nets.settle(model))["1"] is None


@pytest.mark.parametrize("make", nets.ALL, ids=lambda c: c.__name__)
def test_pushing_a_permutation_does_not_change_outputs(make, monkeypatch):
    model, x = nets.settle(make()), nets.images()
    pushed = ghostify(model, calibration=x)
    monkeypatch.setattr(sys.modules["ghostify.rewriting.apply"], "push_permutation", lambda *_: None)
    reordered = ghostify(model, calibration=x)
    torch.testing.assert_close(pushed(x), reordered(x), rtol=1e-4, atol=1e-5)


def test_the_report_has_the_layers_that_reorder_their_output():
    converted = ghostify(nets.settle(nets.Residual()), calibration=nets.images())
    reported = {layer.name: layer.reorders_output for layer in report(converted).layers if layer.skip_reason is None}
    ghosts = {n: m.order is not None for n, m in converted.named_modules() if isinstance(m, GhostModule)}
    assert reported == ghosts
