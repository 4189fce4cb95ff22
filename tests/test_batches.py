from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

from ghostify import GhostifyError, ghostify, trace
from ghostify.graph.batches import bind_batch, run_batch
from ghostify.graph.inputs import CallArguments
from tests import nets

X, C, LABEL = torch.ones(2), 2 * torch.ones(2), torch.arange(2)
Pair = namedtuple("Pair", "image label")


class TwoInputs(nn.Module):
    def forward(self, x, c=None, *, scale=1.0):
        return scale * (x if c is None else x + c)


class Required(nn.Module):
    def forward(self, x, c):
        return x + c


class Starred(nn.Module):
    def forward(self, *xs, **options):
        return sum(xs, *options.values())


class Detector(nn.Module):
    def forward(self, images, targets=None):
        return [image.mean() for image in images], targets


class OfDict(nn.Module):
    def forward(self, given):
        return given["image"]


IMAGES, OTHERS, TARGETS = [torch.ones(3, 4, 4)], [torch.zeros(3, 4, 5)] * 2, [{"boxes": torch.ones(1, 4)}]


@pytest.mark.parametrize(
    ("module", "example", "batch", "args", "kwargs"),
    [
        (TwoInputs, None, X, (X,), {}),
        (TwoInputs, None, (X, LABEL), (X,), {}),
        (TwoInputs, None, [X, LABEL], (X,), {}),
        (TwoInputs, None, Pair(X, LABEL), (X,), {}),
        (TwoInputs, None, {"x": X, "c": C, "label": LABEL}, (), {"x": X, "c": C}),
        (TwoInputs, X, (X, LABEL), (X,), {}),
        (TwoInputs, X, {"x": X, "c": C}, (), {"x": X, "c": C}),
        (TwoInputs, (X, C), (X, C, LABEL), (X, C), {}),
        (TwoInputs, (X, C), X, (X,), {}),
        (TwoInputs, {"c": C, "x": X}, (X, C, LABEL), (), {"x": X, "c": C}),
        (TwoInputs, {"x": X}, {"x": X, "c": LABEL}, (), {"x": X}),
        (TwoInputs, {"x": X}, UserDict(x=X, c=LABEL), (), {"x": X}),
        (TwoInputs, {"x": X, "scale": 2.0}, (X,), (), {"x": X}),
        (Required, None, (X, C, LABEL), (X, C), {}),
        (Required, X, {"x": X, "c": C}, (), {"x": X, "c": C}),
        (Starred, None, (X, LABEL), (X,), {}),
        (Starred, (X, C), (X, C, LABEL), (X, C), {}),
        (Starred, {"a": X}, {"a": X, "b": LABEL}, (), {"a": X}),
        (Starred, None, {"a": X, "b": C}, (), {"a": X, "b": C}),
        (Detector, (IMAGES,), (OTHERS, TARGETS), (OTHERS,), {}),
        (Detector, (IMAGES,), (tuple(OTHERS), tuple(TARGETS)), (tuple(OTHERS),), {}),
        (Detector, (IMAGES,), OTHERS, (OTHERS,), {}),
        (Detector, (IMAGES, TARGETS), (OTHERS, TARGETS), (OTHERS, TARGETS), {}),
        (OfDict, ({"image": X},), {"image": X, "label": LABEL}, ({"image": X, "label": LABEL},), {}),
        (OfDict, {"given": {"image": X}}, {"given": {"image": C}}, (), {"given": {"image": C}}),
    ],
)
def test_a_batch_fills_the_arguments_that_the_example_fills(module, example, batch, args, kwargs):
    inputs = bind_batch(module(), batch, example)
    assert (inputs.args, inputs.kwargs) == (args, kwargs)


def test_a_graph_takes_what_its_module_takes():
    module = trace(nets.settle(nets.Optional()), (nets.images(1), torch.ones(1))).module
    x, bias = nets.images(2), torch.ones(1)
    assert bind_batch(module, (x, bias), (x, bias)).values == (x, bias, 1.0)
    assert bind_batch(module, (x, bias), x).values == (x, None, 1.0)
    assert bind_batch(module, (x, bias)).values == (x, None, 1.0)
    assert bind_batch(module, {"bias": bias, "x": x, "label": LABEL}).values == (x, bias, 1.0)


@pytest.mark.parametrize(("batch", "example"), [(X, None), ({"c": X}, None), ((), (X, C)), ({}, {"x": X, "c": C})])
def test_a_batch_without_a_required_argument_is_named(batch, example):
    with pytest.raises(GhostifyError, match=r"^calibration batch 3: missing a required argument: '[xc]' of forward"):
        bind_batch(Required(), batch, example, "calibration batch 3")


def test_a_batch_on_which_the_model_does_not_run_is_named():
    conv = nn.Conv2d(3, 4, 3)
    with pytest.raises(GhostifyError, match=r"^calibration batch 2: the model does not run on it") as raised:
        run_batch(conv, CallArguments((torch.ones(1, 5, 8, 8),), {}), 2)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("make", [nets.Straight, nets.Stubborn, nets.Wild], ids=lambda c: c.__name__)
def test_a_wrong_batch_among_right_ones_is_named(make):
    model, x, bad = nets.settle(make()), nets.images(8), torch.zeros(2, 5, 12, 12)
    with pytest.raises(GhostifyError, match=r"^calibration batch 1: the model does not run on it"):
        ghostify(model, ratio=2, example_inputs=x, calibration=[x, bad])


def test_arguments_of_a_forward_without_a_signature_are_taken_as_they_are():
    class Unknown(nn.Module):
        forward = dict.fromkeys  # a builtin without a signature

    inputs = bind_batch(Unknown(), (X, C), (X, C))
    assert inputs.args == (X, C)
