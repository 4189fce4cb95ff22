import pytest
import torch
from torch import nn

from ghostify import GhostifyError, fit, ghostify, plan, trace
from tests import nets


class Scaled(nets.Straight):
    """A forward for images of integers."""

    def forward(self, x):
        return super().forward(x.float() / 255)


def refused(calibration, model=None):
    """The message that refuses a calibration set."""
    with pytest.raises(GhostifyError) as caught:
        ghostify(model or nets.settle(nets.Straight()), calibration=calibration)
    assert str(caught.value).isprintable()
    return caught.value


@pytest.mark.parametrize("value", [5, "photos", b"photos", nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Conv2d, object()])
def test_what_yields_no_batches_is_refused(value):
    assert "yields no batches" in str(refused(value))


@pytest.mark.parametrize(
    "batch",
    [
        nets.images()[:, :1],
        [[nets.images()]],
        nets.images()[0, 0],
        nets.images()[0],
        nets.images().long(),
        nets.images().to(torch.uint8),
        nets.images().bool(),
        nets.images().to(torch.complex64),
        nets.images().to("meta"),
        nets.images().to_sparse(),
        nets.images()[..., :0],
        "a.png",
        None,
        {"y": nets.images()},
    ],
    ids=str,
)
def test_a_batch_that_the_model_does_not_run_on_is_refused_by_its_number(batch):
    assert "calibration batch 1" in str(refused([nets.images(), batch]))


def test_the_reason_is_the_first_line_of_the_error_and_its_cause():
    error = refused([nets.images()[:, :1]])
    assert "expected input" in str(error)
    assert isinstance(error.__cause__, RuntimeError)


def test_nan_among_complex_numbers_is_refused():
    batch = nets.images().to(torch.complex64)
    batch[0, 0, 0, 0] = complex(0, float("nan"))
    assert "NaN" in str(refused([batch]))


def test_a_loader_that_fails_is_named_with_the_batch():
    def batches():
        yield nets.images()
        raise OSError("cannot open 3.png\nmore")

    error = refused(batches())
    assert "calibration batch 1: cannot be read (OSError: cannot open 3.png)" in str(error)
    assert isinstance(error.__cause__, OSError)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_another_floating_point_type_are_converted(dtype):
    model, x = nets.settle(nets.Straight()), nets.images().to(dtype)
    converted, expected = (ghostify(model, calibration=[images]).state_dict() for images in (x, x.float()))
    assert all(torch.equal(value, expected[name]) for name, value in converted.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_images_are_converted_to_the_type_of_the_model(dtype):
    model = nets.settle(nets.Straight()).to(dtype)
    converted = ghostify(model, calibration=[nets.images()])
    assert {p.dtype for p in converted.parameters()} == {dtype}


def test_integers_that_the_model_takes_stay_integers():
    x = (nets.images() * 100).to(torch.uint8)
    converted = ghostify(nets.settle(Scaled()), calibration=[x])
    assert converted(x).shape == (8, 5)


def test_images_that_require_gradients_are_used_without():
    model, x = nets.settle(nets.Straight()), nets.images()
    program = trace(model)
    planned = plan(program)
    expected = fit(program, planned, [x]).weights
    actual = fit(program, planned, [x.clone().requires_grad_() * 1]).weights
    assert all(torch.equal(actual[name].primary_weight, w.primary_weight) for name, w in expected.items())


def test_a_loader_that_is_used_up_is_refused():
    batches = iter([nets.images()])
    ghostify(nets.settle(nets.Straight()), calibration=batches)
    assert "yields no batches" in str(refused(batches))
