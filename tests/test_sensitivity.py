from dataclasses import dataclass

import pytest
import torch
from torch import nn

import ghostify.fitting.sensitivity as module
from ghostify import ghostify, report, trace
from ghostify.fitting.calibration import bind_calibration
from ghostify.fitting.output_scale import output_scale
from ghostify.fitting.sensitivity import error_metric, output_sensitivity
from tests import nets


def sensitivity(model, batches, **options):
    program = trace(model)
    bound = bind_calibration(program.module, batches)
    return output_sensitivity(program, bound, output_scale(program.module, bound), **options)


def test_it_predicts_the_output_error_of_small_noise():
    model, x = nets.settle(nets.Straight()), nets.images(32, 12)
    matrix = sensitivity(model, [x], images=32, probes=64)["a.0"]
    wanted = model(x).double()
    variance = wanted.var(0, correction=0).sum()
    for direction in (torch.eye(len(matrix))[0], torch.eye(len(matrix))[5], torch.randn(len(matrix))):

        def disturb(_module, _inputs, output, direction=direction):
            return output + 0.01 * torch.randn_like(output[:, :1]) * direction[:, None, None]

        handle = model.a[0].register_forward_hook(disturb)
        errors = [(model(x) - wanted).square().sum() / len(x) / variance for _ in range(40)]
        handle.remove()
        assert torch.stack(errors).mean().item() == pytest.approx(
            (direction @ matrix @ direction).item() * 1e-4, rel=0.35
        )


def test_large_maps_are_sampled(monkeypatch):
    model, x = nets.settle(nets.Straight()), nets.images(16, 16)
    whole = sensitivity(model, [x])["a.0"]
    monkeypatch.setattr(module, "MAX_POSITIONS", 100)
    some = sensitivity(model, [x])["a.0"]
    assert not torch.equal(some, whole)
    torch.testing.assert_close(some.trace(), whole.trace(), rtol=0.2, atol=0)


def test_a_metric_is_positive_definite_and_keeps_sensitivities():
    matrix = torch.tensor([[4.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    metric = error_metric(matrix, torch.ones(3))
    torch.testing.assert_close(metric.diagonal()[:2], torch.tensor([4.0, 1.0], dtype=torch.float64))
    assert torch.linalg.eigvalsh(metric).min() > 0
    assert metric[0, 1] == pytest.approx(1.8)


def test_a_channel_of_large_variance_that_the_outputs_do_not_feel_costs_little():
    sensitivity, variances = torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0])), torch.tensor([1.0, 1.0, 1e9, 1e-9])
    costs = error_metric(sensitivity, variances).diagonal() * variances
    assert (costs[2:] < 0.02 * costs[:2].mean()).all()


def test_the_sensitivity_to_an_unused_channel_is_zero():
    model = nets.settle(nets.Straight())
    model.b[0].weight.data[:, 3] = 0
    matrix = sensitivity(model, nets.images(8))["a.0"]
    assert not matrix[3].any()
    assert (matrix.diagonal() > 0).sum() > 8


def test_images_are_limited_and_parameters_stay_frozen():
    model, x = nets.settle(nets.Residual()), nets.images(16)
    program = trace(model)
    all_images, six = (bind_calibration(program.module, batches) for batches in (x.split(4), [x[:4], x[4:6]]))
    scale = output_scale(program.module, all_images)
    few = output_sensitivity(program, all_images, scale, images=6)
    same = output_sensitivity(program, six, scale, images=99)
    assert all(torch.equal(few[k], same[k]) for k in few)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("make", nets.ALL, ids=lambda c: c.__name__)
def test_every_convolution_of_the_graph_has_a_sensitivity(make):
    model = nets.settle(make())
    sensitivities = sensitivity(model, nets.images(4))
    supported = {c.name for c in trace(model).convolutions if c.unsupported_reason is None}
    assert supported == set(sensitivities)


def test_outputs_without_gradient_have_no_sensitivity():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x).argmax(1)

    assert sensitivity(Counts().eval(), nets.images(2)) == {}


def test_models_that_overwrite_activations_have_no_sensitivity():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            x = self.a(x)
            return x.mul_(torch.sigmoid(x)).add_(self.b(x))

    assert sensitivity(InPlace().eval(), nets.images(2)) == {}


@dataclass
class Scores:
    values: torch.Tensor


OUTPUTS = {
    "no rows": lambda y: y[y.mean((1, 2, 3)) > 1e9],
    "no rows of several": lambda y: {"boxes": y[:0], "labels": y[:0, 0, 0, 0].long()},
    "integers": lambda y: y.argmax(1),
    "booleans": lambda y: y > 0,
    "None": lambda _: None,
    "an empty dict": lambda _: {},
    "an empty list": lambda _: [],
    "a dataclass": Scores,
    "a number": lambda y: y.mean().item(),
    "a string": lambda _: "none",
    "NaN": lambda y: y * torch.nan,
}


class Answering(nn.Module):
    """A network whose output is the result of `answer`."""

    def __init__(self, answer):
        super().__init__()
        self.a, self.b, self.answer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), answer

    def forward(self, x):
        return self.answer(self.b(torch.relu(self.a(x))))


@pytest.mark.filterwarnings("ignore:calibration batch 0. the model's outputs have NaN values")
@pytest.mark.parametrize("answer", OUTPUTS.values(), ids=OUTPUTS)
def test_a_model_whose_outputs_say_nothing_is_fitted_without_sensitivity(answer):
    model, x = Answering(answer).eval(), nets.images(8)
    assert sensitivity(model, [x]) == {}
    layer = report(ghostify(model, ratio=2, calibration=[x])).layers[1]
    assert layer.holdout_error < 0.9


def test_outputs_that_are_not_finite_do_not_count():
    """The others give the sensitivities that they have on their own; NaN is named, a mask is not."""
    model, x = Answering(lambda y: (y,)).eval(), nets.images(4)
    finite = sensitivity(model, [x])
    model.answer = lambda y: (y, y[:, :1] - torch.inf)
    masked = sensitivity(model, [x])
    model.answer = lambda y: (y, (y[:, :1] * 0) / 0)
    with pytest.warns(UserWarning, match="calibration batch 0: the model's outputs have NaN values"):
        undefined = sensitivity(model, [x])
    assert set(finite) == set(masked) == {"a", "b"}
    assert all(torch.equal(finite[name], masked[name]) for name in finite)
    assert undefined == {}
