from dataclasses import replace

import pytest
import torch
from torch import nn

import ghostify.fitting.output_scale as scale_module
from ghostify import GhostifyError, fit, ghostify, plan, plan_for_budget, rewrite, trace
from ghostify.fitting.calibration import bind_calibration
from ghostify.fitting.output_scale import OutputScale, output_scale
from ghostify.fitting.sensitivity import output_sensitivity, prepare_calibration
from ghostify.planning.policy import Policy, Rule
from tests import nets


class Answering(nn.Module):
    """A network whose output is `answer` of its input."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def scale_of(values, answer=lambda x: x, batch=8):
    traced = trace(Answering(answer)).module
    return output_scale(traced, bind_calibration(traced, values.split(batch)))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_spread(deviation):
    return (deviation.max() / deviation.min()).item()


def test_the_error_of_outputs_replaced_by_their_means_is_one_for_each_tensor():
    x = normal(40, 6, 5, 5) * torch.tensor([1.0, 1.2, 3.0, 100.0, 130.0, 0.2])[:, None, None] + 7

    def answer(x):
        return {"maps": x[:, :3], "rest": [x[:, 3:].flatten(1), x.argmax(1)]}

    scale, outputs = scale_of(x, answer), answer(x)
    means = {"maps": x[:, :3].mean(0).expand(40, -1, -1, -1), "rest": [x[:, 3:].flatten(1).mean(0).expand(40, -1), 0]}
    assert len(scale.deviations) == 2
    assert scale.error(outputs, means, 40).item() == pytest.approx(2)
    assert scale.error(outputs, outputs, 40).item() == 0


def test_logits_share_nearly_one_deviation():
    spreads = torch.rand(200, generator=torch.Generator().manual_seed(1)) + 0.5
    logits = normal(64, 200) * spreads
    deviation = scale_of(logits).deviations[0]
    assert relative_spread(logits.std(0)) > 3
    assert relative_spread(deviation) < 1.4
    assert deviation.mean().item() == pytest.approx(logits.std(0).square().sum().sqrt().item(), rel=0.1)


@pytest.mark.parametrize("unit", [1e-5, 1, 1e3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_boxes_and_scores_count_the_same_in_any_unit_and_layout(unit, channels_last):
    x = normal(32, 6, 40) * torch.tensor([50, 55, 60, 45, 0.02, 0.02])[:, None] * torch.linspace(1, 2, 40)
    noise, expected = normal(32, 6, 40, seed=1), []
    for factors in (torch.ones(6), torch.tensor([unit, unit, unit, unit, 1, 1])):
        values, disturbed = (v * factors[:, None] for v in (x, x + 0.1 * x.std((0, 2))[:, None] * noise))
        if channels_last:
            values, disturbed = values.transpose(1, 2), disturbed.transpose(1, 2)
        scale = scale_of(values)
        assert scale.deviations[0].numel() == 6
        errors = ((disturbed - values) / scale.deviations[0]).square().sum((0, 1 if channels_last else 2))
        assert 0.8 < errors[:4].mean() / errors[4:].mean() < 1.25
        expected.append(scale.error(values, disturbed, 32).item())
    assert expected[1] == pytest.approx(expected[0], rel=0.05)


def test_neither_still_channels_nor_single_images_decide():
    x = normal(32, 8) + 3
    plain = scale_of(x).deviations[0]
    x[:, 0] = 3 + 1e-6 * normal(32)
    x[:, 1] = 0
    x[5, 2] = 1e4
    deviation = scale_of(x).deviations[0]
    assert 0.02 < deviation[0] / deviation[3] < 0.2  # at least a hundredth of its value 3
    assert 0.3 < deviation[1] / deviation[3] < 3  # no scale of its own
    assert 0.5 < deviation[2] / plain[2] < 3


def test_a_tensor_without_values_does_not_count():
    x = normal(8, 4)
    scale = scale_of(x, lambda x: (x, x * 0))
    assert scale.error((x, x * 0), (x, x + 1), 8).item() == 0
    assert scale_of(x, lambda x: x.argmax(1)).deviations == ()


def test_one_image_has_one_deviation():
    x = normal(1, 5)
    torch.testing.assert_close(scale_of(x).deviations[0], x.norm().expand(5))


def test_rows_of_which_the_number_varies_are_compared_in_order():
    x = normal(16, 6, 6) * torch.tensor([200, 200, 200, 200, 0.3, 0.3])

    def answer(x):
        return x.flatten(0, 1)[x[..., 0].flatten() > 0]

    rows = answer(x)
    scale = scale_of(x, answer, batch=4)
    assert scale.deviations[0].shape == (6,)
    assert scale.error(rows, rows[:0], 16).item() == pytest.approx(1, rel=0.1)
    assert scale.error(rows, rows[:-1], 16) == scale.error(rows[-1:], rows[:0], 16) > 0


def test_a_dict_for_each_image_counts_like_a_batch():
    """Whatever the number of images in a batch; what an image lacks counts as 0."""
    x = normal(10, 6, 5) * torch.tensor([200, 200, 200, 200, 0.3])
    kept = x[..., 0] > -50

    def answer(x):
        rows = [image[image[:, 0] > -50] for image in x.flatten(2)]
        return [{"boxes": r[:, :4], "scores": r[:, 4], "labels": r[:, 4].long()} for r in rows]

    module = Answering(answer)
    scale = output_scale(module, bind_calibration(module, x[..., None].split(4)))
    assert [s.shape for s in scale.deviations] == [(4,), (1,)]
    zeros = x * kept[..., None]
    batch = {"boxes": zeros[..., :4], "scores": zeros[..., 4]}
    nothing = [{key: values[:0] for key, values in image.items()} for image in answer(x)]
    wanted = sum((batch[k] / s).square().sum().item() / 10 for k, s in zip(batch, scale.deviations, strict=True))
    assert scale.error(answer(x), nothing, 10).item() == pytest.approx(wanted)
    assert wanted == pytest.approx(2, rel=0.2)


def test_values_that_are_not_finite_count_only_in_the_converted_model():
    x = normal(8, 4)
    scale, infinite = scale_of(x), x.clone()
    infinite[0, 0] = -torch.inf
    assert scale.error(infinite, x, 8).item() == 0
    assert scale.error(x, infinite, 8).item() == torch.inf


class Detector(nn.Module):
    """Boxes in pixels from one half of the features and scores from the other, in one tensor."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, padding=1)
        self.boxes, self.scores = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y = torch.relu(self.features(x))
        return torch.cat([200 * self.boxes(y[:, :4]), torch.sigmoid(self.scores(y[:, 4:]))], 1).flatten(2)


def test_scores_beside_boxes_in_pixels_keep_their_values():
    torch.manual_seed(0)
    model, x = Detector().eval(), nets.images(32)
    program = trace(model, x[:1])
    planned = plan(program, Policy((Rule(ratio=2, cheap="pointwise"),), keep_first=False))
    prepared = prepare_calibration(program, [x])
    common = OutputScale((torch.tensor(1e4),))
    as_one = replace(prepared, sensitivity=output_sensitivity(program, prepared.batches, common), output_scale=common)
    errors = []
    for calibration in (as_one, prepared):
        converted = rewrite(program, planned, fit(program, planned, calibration).weights)
        scores, wanted = (m(x)[:, 4:].detach() for m in (converted, model))
        errors.append(((scores - wanted).square().sum() / wanted.var(0).sum()).item() / len(x))
    assert errors[1] < 0.5 * errors[0]


def test_errors_of_outputs_that_are_not_important_are_irrelevant():
    torch.manual_seed(0)
    model, x = Detector().eval(), nets.images(16)
    program = trace(model, x[:1])
    prepared = prepare_calibration(program, [x], importance=lambda y: {"scores": y[:, 4:]})
    sensitivity = prepared.sensitivity["features"]
    assert not sensitivity[:4].any()
    assert sensitivity[4:, 4:].diagonal().min() > 0
    assert set(prepared.sensitivity) == {"features", "scores"}
    expected = model(x)
    disturbed = expected + torch.tensor([9.0, 9, 9, 9, 0, 0])[:, None]
    assert prepared.output_scale.error(expected, disturbed, 16) == 0
    assert prepared.output_scale.error(expected, expected + 0.1, 16) > 0.1


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (lambda outputs: outputs.argmax(1), "importance: returns no floating-point tensors. Return those"),
        (lambda outputs: outputs["boxes"], r"importance: the function failed \(\w+Error: .*Correct it"),
    ],
)
def test_importance_that_returns_nothing_is_an_error(importance, message):
    model, x = Detector().eval(), nets.images(2)
    program, planned = trace(model, x), plan(trace(model, x))
    for convert in (
        lambda: ghostify(model, calibration=[x], importance=importance),
        lambda: fit(program, planned, [x], importance=importance),
        lambda: plan_for_budget(program, Policy(), {"macs": 0.9}, [x], importance=importance),
    ):
        with pytest.raises(GhostifyError, match=message):
            convert()


def test_importance_needs_images():
    with pytest.raises(GhostifyError, match="importance: needs calibration images"):
        ghostify(Detector().eval(), importance=lambda outputs: outputs)


def test_the_dimension_of_many_values_is_smoothed_in_parts(monkeypatch):
    x = normal(16, 50) * torch.logspace(-2, 2, 50)
    whole = scale_of(x).deviations[0]
    monkeypatch.setattr(scale_module, "CHANNELS_AT_A_TIME", 7)
    torch.testing.assert_close(scale_of(x).deviations[0], whole)
