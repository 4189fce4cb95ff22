from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ghostify import ghostify, report
from ghostify.fitting.error_measure import error_measure, usable_sensitivity
from ghostify.fitting.moments import Moments
from ghostify.numerics import relative_squared_error
from ghostify.pruning.slicing import slice_conv
from tests import nets

WIDTH, DEAD = 12, (3, 10)
CALIBRATION, TEST = nets.images(32, 12, seed=5), nets.images(32, 12, seed=77)


class Demosaicking(nn.Module):
    """Convolutions between which only activations are, a pixel shuffle, and a shortcut from the input."""

    def __init__(self, activation=nn.PReLU, bias=False):
        super().__init__()
        torch.manual_seed(0)
        sizes = [3, WIDTH, WIDTH, WIDTH, 12]
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, padding=1, bias=bias) for a, b in pairwise(sizes)])
        self.activations = nn.ModuleList([activation() for _ in self.convs[1:]])

    def forward(self, x):
        y = x
        for conv, activation in zip(self.convs, self.activations, strict=False):
            y = activation(conv(y))
        return F.pixel_shuffle(self.convs[-1](y), 2) + F.interpolate(x, scale_factor=2.0)


def scale_filters(model, factor, of_readers=1.0):
    """Scale the filters of the channels `DEAD` of each layer, and those that read them."""
    with torch.no_grad():
        for conv, reader in zip(model.convs[1:], model.convs[2:], strict=False):
            conv.weight[DEAD, :] *= factor
            reader.weight[:, DEAD] *= of_readers


def without_dead(model):
    """The network without these channels."""
    kept = tuple(k for k in range(WIDTH) if k not in DEAD)
    first, second, third, last = model.convs
    model.convs = nn.ModuleList(
        [first, slice_conv(second, kept, None), slice_conv(third, kept, kept), slice_conv(last, None, kept)]
    )
    return model


def error(model, converted):
    with torch.no_grad():
        shortcut = F.interpolate(TEST, scale_factor=2.0)
        return float(relative_squared_error(converted(TEST) - shortcut, model(TEST) - shortcut, over=(0, 2, 3)))


@pytest.mark.parametrize(
    ("activation", "factor", "of_readers", "form"),
    [(nn.PReLU, 0, 1, {}), (nn.ReLU, 1e-6, 100, {"cheap": "pointwise"}), (nn.PReLU, 1e-6, 100, {"ratio": 4})],
)
def test_dead_filters_do_not_spoil_the_fit_of_a_regression_network(activation, factor, of_readers, form):
    model, smaller = Demosaicking(activation), Demosaicking(activation)
    scale_filters(model, factor, of_readers)
    scale_filters(smaller, 0)
    smaller = without_dead(smaller)
    fitted, fitted_smaller = (ghostify(m.eval(), calibration=CALIBRATION.split(16), **form) for m in (model, smaller))
    assert not any(layer.is_data_free for layer in report(fitted).layers)
    assert error(model, fitted) < 1.25 * error(smaller, fitted_smaller)


@pytest.mark.parametrize("form", [{"cheap": "pointwise"}, {"activated": True}], ids=str)
def test_a_channel_that_is_constant_on_the_holdout_does_not_rule_its_layer(form):
    model = Demosaicking(nn.ReLU, bias=True).eval()
    with torch.no_grad():
        model.convs[0].weight[3] = 0.2
        sums = F.conv2d(CALIBRATION, model.convs[0].weight[3:4], padding=1)
        model.convs[0].bias[3] = -sums.flatten().kthvalue(int(0.999 * sums.numel())).values
        for conv in model.convs[1:3]:  # reads nothing but what is active in 0.1 % of the positions
            conv.weight[3], conv.bias[3] = 0, 0
            conv.weight[3, 3, 1, 1] = 1
    layers = report(ghostify(model, calibration=CALIBRATION.split(16), **form)).layers
    assert all(layer.fit_error < 1 and layer.holdout_error < 1 for layer in layers if layer.skip_reason is None)


def test_errors_are_weighed_by_sensitivity_where_it_is_known():
    moments, y = Moments.zero(2, 3), torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) + 1
    moments.add(y[:, :2], y)
    sensitivity = torch.diag(torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64))
    measure = error_measure(moments, sensitivity, torch.ones(3), free_mean=True)
    variances = y.double().var(0, correction=0)
    torch.testing.assert_close(measure.scales, variances)
    assert measure.cost(measure.relative(variances)) == pytest.approx(float((sensitivity.diagonal() * variances).sum()))
    by_default = error_measure(moments, None, torch.ones(3), free_mean=False)
    torch.testing.assert_close(by_default.scales, y.double().square().mean(0))
    assert by_default.weights.tolist() == [1, 1, 1]


@pytest.mark.parametrize("matrix", [None, torch.zeros(3, 3), torch.full((3, 3), torch.nan)])
def test_a_sensitivity_that_says_nothing_is_not_used(matrix):
    assert usable_sensitivity(matrix, torch.tensor([0, 2])) is None
