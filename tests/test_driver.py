import copy
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ghostify import GhostifyError, Policy, Rule, fit, ghostify, plan, report, rewrite, trace
from ghostify.evaluation.metrics import predict, relative_error
from ghostify.fitting import ghost_fit
from ghostify.fitting.lstsq import DEFAULT_METHOD, FitMethod
from ghostify.modules.ghost import build_ghost_module
from tests import nets


def error(model, converted, x):
    return relative_error(predict(converted, [x]), predict(model, [x]))


@pytest.mark.parametrize("cheap", ["depthwise", "pointwise", 2])
@pytest.mark.parametrize("make", nets.ALL, ids=lambda c: c.__name__)
def test_calibration_beats_the_data_free_fit(make, cheap):
    model, x = nets.settle(make()), nets.images(32, 16)
    calibrated = ghostify(model, cheap=cheap, calibration=x.split(8))
    free = ghostify(model, cheap=cheap)
    test = nets.images(16, 16, seed=9)
    assert error(model, calibrated, test) < error(model, free, test)


def dense_equivalent(ghost, layout, inputs):
    """One dense convolution that computes what a ghost module with an unpadded primary convolution and d = 1 does."""
    primary = ghost.primary_conv
    mixing = torch.zeros(layout.ghosts, layout.intrinsic)
    position = 0
    for conv, spec in zip(ghost.cheap_convs, layout.conv_specs, strict=True):
        per = spec.outputs // spec.groups
        size = (spec.stop - spec.start) // spec.groups
        for k in range(spec.outputs):
            first = spec.start + (k // per) * size
            mixing[position, first : first + size] = conv.weight[k, :, 0, 0].detach()
            position += 1
    rows = torch.cat((torch.eye(layout.intrinsic), mixing))
    conv = nn.Conv2d(inputs, layout.outputs, primary.kernel_size, padding=primary.padding, bias=False)
    conv.weight.data = torch.einsum("nm,mchw->nchw", rows, primary.weight.detach())
    return conv


@given(
    st.integers(4, 10), st.sampled_from([1.5, 2, 3]), st.sampled_from(["depthwise", "pointwise"]), st.integers(0, 99)
)
@settings(max_examples=20, deadline=None)
def test_a_convolution_that_is_a_ghost_is_recovered(outputs_, ratio, cheap, seed):
    torch.manual_seed(seed)
    chosen_plan = plan(
        trace(nn.Sequential(nn.Conv2d(5, outputs_, 3))), Policy((Rule(ratio=ratio, cheap=cheap, dw_size=1),), False)
    )
    layout = chosen_plan.rewrites[0].layout
    ghost = build_ghost_module(nn.Conv2d(5, outputs_, 3, bias=False), layout)
    for parameter in ghost.parameters():
        nn.init.normal_(parameter)
    shuffled = dense_equivalent(ghost, layout, 5)
    shuffled.weight.data = shuffled.weight.data[torch.randperm(outputs_)]
    model = nn.Sequential(shuffled)
    policy = Policy((Rule(ratio=ratio, cheap=cheap, dw_size=1),), keep_first=False)
    x = torch.randn(8, 5, 10, 10)
    for calibration in (None, [x]):
        converted = ghostify(model, policy=policy, calibration=calibration)
        assert error(model, converted, x) < 1e-4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("d", [3, 5])
def test_spatial_ghosts_are_recovered_up_to_the_border(d, bias):
    """A dense convolution built from 3 x 3 filters and a d x d ghost of each: exact but where padding meets padding."""
    torch.manual_seed(1)
    primary = torch.randn(4, 5, 3, 3)
    kernels = torch.randn(4, d, d)
    size = 3 + d - 1
    dense = torch.zeros(8, 5, size, size)
    edge = d // 2
    dense[:4, :, edge : edge + 3, edge : edge + 3] = primary
    for a in range(d):
        for b in range(d):
            dense[4:, :, a : a + 3, b : b + 3] += kernels[:, a, b, None, None, None] * primary
    conv = nn.Conv2d(5, 8, size, bias=bias)
    conv.weight.data = dense[torch.randperm(8)]
    model = nn.Sequential(conv)
    policy = Policy((Rule(dw_size=d),), keep_first=False)
    converted = ghostify(model, policy=policy)
    x = torch.randn(4, 5, 24, 24)
    inside = slice(d, -d)
    expected, outputs = model(x)[..., inside, inside], converted(x)[..., inside, inside]
    assert ((outputs - expected).square().sum() / expected.square().sum()) < 1e-4


def test_the_fit_is_deterministic_under_a_seed():
    model, x = nets.settle(nets.Residual()), nets.images(16, 12)
    first, again = (ghostify(model, calibration=x.split(4), seed=5) for _ in range(2))
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_batching_of_the_calibration_set_does_not_matter():
    model, x = nets.settle(nets.Straight()), nets.images(16, 12)
    single, several = (ghostify(model, calibration=x.split(k)) for k in (16, 5))
    torch.testing.assert_close(single(x), several(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["tensor", "pair", "dict"])
def test_forms_of_calibration(form):
    model, x = nets.settle(nets.Straight()), nets.images(8)
    batches = {"tensor": x, "pair": [(x, torch.zeros(8))], "dict": [{"x": x}]}[form]
    assert report(ghostify(model, calibration=batches)).images == 8


@pytest.mark.filterwarnings("ignore:calibration batch 0. the model.s outputs have NaN values")
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration: yields no batches"),
        ([torch.zeros(0, 3, 8, 8)], "calibration batch 0: has no images"),
        ([nets.images(2), torch.full((2, 3, 12, 12), float("nan"))], "calibration batch 1: has NaN"),
        ([torch.full((2, 3, 12, 12), 3e38)], "calibration batch 0: .* not finite"),
    ],
)
def test_invalid_calibration_is_an_error(batches, message):
    with pytest.raises(GhostifyError, match=message):
        ghostify(nets.settle(nets.Straight()), calibration=batches)


@pytest.mark.parametrize(
    "x", [nets.images(1), torch.zeros(4, 3, 12, 12), nets.images(4, 1)], ids=["one", "constant", "pixel"]
)
def test_little_calibration_gives_a_finite_model(x):
    model = nets.settle(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 9, 3, padding=1)))
    converted = ghostify(model, calibration=x)
    assert converted(nets.images()).isfinite().all()


def test_batchnorm_keeps_its_variance_and_its_mean_takes_the_shift():
    model, x = nets.settle(nets.Straight()), nets.images(16)
    program = trace(model)
    chosen_plan = plan(program)
    fits = fit(program, chosen_plan, x)
    converted = rewrite(program, chosen_plan, fits.weights)
    norm, before = converted.get_submodule("b.1"), model.b[1]
    assert torch.equal(norm.running_var, before.running_var)
    shift = fits.weights["b.0"].norm_shift
    torch.testing.assert_close(norm.running_mean, before.running_mean - shift.float())
    assert converted.get_submodule("b.0").primary_conv.bias is None


def test_the_report_has_errors_on_the_holdout():
    model, x = nets.settle(nets.Straight()), nets.images(16)
    layers = [layer for layer in report(ghostify(model, calibration=x)).layers if layer.skip_reason is None]
    assert all(0 <= layer.holdout_error < 1 and 0 <= layer.fit_error < 1 for layer in layers)
    assert all(layer.holdout_error is None for layer in report(ghostify(model, calibration=x[:1])).layers)


@given(st.integers(4, 9), st.integers(3, 6), st.integers(0, 99), st.sampled_from(["depthwise", "pointwise"]))
@settings(max_examples=25)
def test_no_layer_is_worse_than_data_free_on_the_holdout(images, size, seed, cheap):
    """One layer, on few images and pixels, evaluated on the holdout of the fit."""
    torch.manual_seed(seed)
    model = nets.settle(nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)))
    x, policy = torch.randn(images, 3, size, size), Policy((Rule(cheap=cheap),), keep_first=False)
    program = trace(model)
    chosen_plan = plan(program, policy)
    fitted, free = fit(program, chosen_plan, x).weights, fit(program, chosen_plan).weights
    every = min(8, images)
    holdout = x[every - 1 :: every]
    errors = [error(model, rewrite(program, chosen_plan, weights), holdout) for weights in (fitted, free)]
    assert errors[0] <= errors[1] * 1.25 + 1e-6  # the weights of errors are estimated on as few images


def test_overfitting_is_warned_of():
    model = nets.settle(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 9, 3, padding=1)))
    with pytest.warns(UserWarning, match=r"fit overfits .*: in 1 of 1 layers \(first: 2\).* the 4 images"):
        ghostify(model, calibration=nets.images(4, 1))


def test_the_report_has_the_seconds_of_each_stage():
    fit_report = report(ghostify(nets.settle(nets.Straight()), calibration=nets.images(8)))
    assert set(fit_report.seconds) == {"sensitivity", "forward", "moments", "solving"}
    assert all(name in fit_report.fit_time for name in fit_report.seconds)


def test_progress_is_reported_to_the_end():
    reports = []
    ghostify(nets.settle(nets.Straight()), calibration=nets.images(4), on_progress=lambda *args: reports.append(args))
    assert reports == [(0, 2, "a.0"), (1, 2, "b.0"), (2, 2, "")]


def test_in_place_operations_do_not_mix_the_two_models():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.last = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x, out_of_place: bool = False):
            x = self.stem(x)
            y = self.conv(x)
            x = x + y if out_of_place else x.add_(y)
            return self.last(x)

    model, x = InPlace().eval(), nets.images(16)
    reference = copy.deepcopy(model)
    reference.forward = lambda x: model.__class__.forward(reference, x, out_of_place=True)
    errors = [error(model, ghostify(m, calibration=x), x) for m in (model, reference)]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)  # the sensitivity is not known with operations in place


def test_layouts_of_the_report_match_the_modules():
    converted = ghostify(nets.settle(nets.Straight()), 3, calibration=nets.images(8))
    for layer in report(converted).layers:
        if layer.skip_reason is None:
            ghost = converted.get_submodule(layer.name)
            assert ghost.primary_conv.out_channels == layer.intrinsic
            assert layer.layout.ghosts == 2 * layer.weight_shape[0] // 3


@pytest.mark.parametrize("bias", [False, True])
def test_layers_with_many_maps_are_fitted_without_moments_between_maps(monkeypatch, bias):
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1, bias=bias), *([] if bias else [nn.BatchNorm2d(24)]))
    model, x = nets.settle(model), nets.images(32, 12)
    policy = Policy((Rule(),), keep_first=False)
    joint = ghostify(model, policy=policy, calibration=x)
    monkeypatch.setattr(ghost_fit, "MAX_JOINT_FEATURES", 9 * 23)
    monkeypatch.setattr(ghost_fit, "MAX_COARSE_FEATURES", 9 * 12)
    per_map, free = ghostify(model, policy=policy, calibration=x), ghostify(model, policy=policy)
    test = nets.images(16, 12, seed=9)
    assert error(model, joint, test) <= error(model, per_map, test) * 1.02 < error(model, free, test)
    layer = report(per_map).layers[0]
    assert layer.holdout_error == pytest.approx(layer.fit_error, rel=0.2)


@pytest.mark.parametrize("name", ["a.0", "b.0"])
@pytest.mark.parametrize("cheap", ["depthwise", "pointwise"])
def test_the_output_error_of_a_layer_is_predicted(name, cheap):
    """Within a factor: errors are taken as independent of gradients and of each other's positions."""
    model, x = nets.settle(nets.Straight(16)), nets.images(64, 16)
    converted = ghostify(model, 2, cheap=cheap, targets=name, example_inputs=x[:1], calibration=x.split(16))
    layer = next(layer for layer in report(converted).layers if layer.name == name)
    measured = relative_error(predict(converted, [x]), predict(model, [x]))
    assert measured / 5 < layer.output_error < 5 * measured
    assert sorted(layer.channels) == list(range(layer.weight_shape[0]))
    assert all(layer.output_error is None for layer in report(ghostify(model, 2)).layers)


@pytest.mark.parametrize("images", [0, 16])
def test_a_layer_before_a_norm_with_gamma_zero_is_fitted(images):
    """A residual branch whose last norm starts at zero, as in timm; wide enough for principal maps."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 512, 3, padding=1), nn.BatchNorm2d(512)).eval()
    nn.init.zeros_(model[2].weight)
    x = nets.images(max(images, 1))
    converted = ghostify(model, 2, example_inputs=x[:1], calibration=x.split(8) if images else None)
    assert all(p.isfinite().all() for p in converted.state_dict().values())
    torch.testing.assert_close(converted(x), model(x))


def test_each_step_of_a_fit_can_be_replaced():
    model, x = nets.settle(nets.Residual()), nets.images(32, 16)
    program = trace(model, x[:1])
    chosen_plan = plan(program, Policy((Rule(ratio=2),)))
    called_steps = []

    def spy(name):
        step = getattr(DEFAULT_METHOD, name)
        return lambda *args, **options: called_steps.append(name) or step(*args, **options)

    steps = [f.name for f in fields(FitMethod)]
    replaced = fit(program, chosen_plan, x.split(8), method=FitMethod(**{name: spy(name) for name in steps}))
    default = fit(program, chosen_plan, x.split(8))
    assert set(called_steps) == set(steps)
    for name, weights in default.weights.items():
        assert torch.equal(weights.primary_weight, replaced.weights[name].primary_weight)
    method = FitMethod(refit_filters=lambda _moments, prior, *_, **__: prior)
    original_filters = fit(program, chosen_plan, x.split(8), method=method)
    assert any(
        not torch.equal(w.primary_weight, original_filters.weights[n].primary_weight)
        for n, w in default.weights.items()
    )
