import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import ghostify.fitting.ghost_fit as module
from ghostify import ghostify, report
from ghostify.numerics import relative_squared_error
from ghostify.pruning.slicing import slice_conv, slice_norm
from tests import nets

OUTPUTS = 16
FORMS = {
    "depthwise": {},
    "pointwise": {"cheap": "pointwise"},
    "grouped": {"cheap": 2},
    "activated": {"activated": True},
}
CALIBRATION, TEST = nets.images(48, seed=5), nets.images(32, seed=77)


def network(has_norm, seed=3):
    """A convolution of 16 outputs with a norm of the statistics that it has on images, or with a bias."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(12, OUTPUTS, 3, padding=1, bias=not has_norm)
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), conv, nn.BatchNorm2d(OUTPUTS, momentum=None))
    model[3] = model[3] if has_norm else nn.Identity()
    model(nets.images(32, seed=99))
    return model.append(nn.ReLU()).eval().requires_grad_(False)


def without(model, channels):
    """The network without some outputs of its second convolution."""
    kept = tuple(k for k in range(OUTPUTS) if k not in channels)
    copied = copy.deepcopy(model)
    copied[2] = slice_conv(model[2], kept, None)
    copied[3] = slice_norm(model[3], kept) if isinstance(model[3], nn.BatchNorm2d) else nn.Identity()
    return copied.eval(), kept


def scale_filter(model, channel, factor, bias=0.0):
    """Scale a filter, and the statistics of its norm; its output is `bias` where the factor is 0."""
    conv, norm = model[2], model[3]
    conv.weight[channel] *= factor
    if isinstance(norm, nn.BatchNorm2d):
        norm.running_mean[channel] *= factor
        norm.running_var[channel] *= factor**2
        norm.bias[channel] = bias
    else:
        conv.bias[channel] = bias


def copy_filter(model, channel):
    for tensor in (*model[2].parameters(), *model[3].parameters(), *model[3].buffers()):
        if tensor.dim():
            tensor[channel] = tensor[channel - 1]


def disable(model, channel):
    if isinstance(model[3], nn.BatchNorm2d):
        model[3].weight[channel] = 0
    else:
        scale_filter(model, channel, 0.0)


DEGENERATE = {
    "constant": lambda model, channel: scale_filter(model, channel, 0.0, 0.4),
    "zero": lambda model, channel: scale_filter(model, channel, 0.0),
    "never active": lambda model, channel: scale_filter(model, channel, 1.0, -100.0),
    "copied": copy_filter,
    "tiny": lambda model, channel: scale_filter(model, channel, 1e-12),
    "disabled by the norm": disable,
}


def relative_error(model, converted, channels):
    with torch.no_grad():
        expected, actual = (m(TEST)[:, channels] for m in (model, converted))
    return float(relative_squared_error(actual, expected, over=(0, 2, 3)))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(DEGENERATE)),
    has_norm=st.booleans(),
    channels=st.lists(st.integers(1, OUTPUTS - 1), min_size=4, max_size=4, unique=True),
)
@pytest.mark.parametrize("form", FORMS)
def test_channels_that_answer_the_same_do_not_spoil_the_fit_of_the_others(form, kind, has_norm, channels):
    model = network(has_norm)
    for channel in channels:
        DEGENERATE[kind](model, channel)
    smaller, kept = without(model, channels)
    fitted, fitted_smaller = (ghostify(m, calibration=[CALIBRATION], **FORMS[form]) for m in (model, smaller))
    everything = range(len(kept))
    error, error_without = relative_error(model, fitted, kept), relative_error(smaller, fitted_smaller, everything)
    assert error < 1.25 * error_without
    layer = report(fitted).layers[1]
    assert layer.holdout_error < 1
    assert layer.fit_error < 1


@pytest.mark.parametrize("kind", ["constant", "zero", "tiny", "disabled by the norm"])
@pytest.mark.parametrize("has_norm", [True, False])
def test_a_layer_of_many_maps_keeps_its_fit_beside_a_constant_channel(monkeypatch, kind, has_norm):
    monkeypatch.setattr(module, "MAX_JOINT_FEATURES", 60)
    model = network(has_norm)
    for channel in (2, 5, 9, 12):
        DEGENERATE[kind](model, channel)
    smaller, kept = without(model, (2, 5, 9, 12))
    fitted, fitted_smaller = (ghostify(m, calibration=[CALIBRATION]) for m in (model, smaller))
    assert relative_error(model, fitted, kept) < 1.1 * relative_error(smaller, fitted_smaller, range(len(kept)))


def test_grouped_ghosts_keep_the_means_of_their_intrinsic_maps():
    model = network(has_norm=False)
    with torch.no_grad():
        model[2].bias.uniform_(-2, 2, generator=torch.Generator().manual_seed(0))
    converted = ghostify(model[:4], calibration=[CALIBRATION], cheap=2)
    means = [m(CALIBRATION)[:, :, 2:-2, 2:-2].mean((0, 2, 3)) for m in (model[:4], converted)]
    torch.testing.assert_close(means[1], means[0], atol=0.1, rtol=0)
