import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ghostify import GhostifyError, Policy, Rule, fit, ghostify, load, plan, report, rewrite, save, trace
from ghostify.evaluation.metrics import predict, relative_error
from ghostify.reconstruction.blockwise import reconstruct_blocks
from ghostify.summary import Report
from tests import nets


class Dense(nn.Module):
    """Every layer reads all before it, so that several values are live everywhere."""

    def __init__(self, layers: int = 9) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8 + 4 * k, 4, 3, padding=1) for k in range(layers))

    def forward(self, x):
        maps = [self.stem(x)]
        for layer in self.layers:
            maps.append(layer(F.relu(torch.cat(maps, 1))))
        return torch.cat(maps, 1)


class Forked(nn.Module):
    """Two inputs, two outputs, and a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, scale):
        x = self.stem(x)
        y = F.relu(self.a(x), inplace=True)
        x += self.b(y)
        return {"sum": x * scale[:, None, None, None], "side": y.mean((2, 3))}


@pytest.fixture(autouse=True)
def _same_networks():
    torch.manual_seed(0)


def error(model, converted, x):
    return relative_error(predict(converted, [x]), predict(model, [x]))


@pytest.fixture(scope="module")
def residual():
    model, x = nets.settle(nets.Residual(16)), nets.images(64, 12)
    return (
        model,
        x,
        ghostify(model, calibration=x.split(32)),
        ghostify(model, calibration=x.split(32), reconstruct=True),
    )


def test_the_error_falls_on_other_images():
    model, x, test = nets.settle(nets.Straight(16)), nets.images(64, 12), nets.images(32, 12, seed=9)
    fitted, reconstructed = (ghostify(model, calibration=x.split(32), reconstruct=k) for k in (False, True))
    assert error(model, reconstructed, test) < 0.7 * error(model, fitted, test)


def test_the_report_has_the_errors_on_the_holdout(residual):
    model, x, fitted, reconstructed = residual
    result = report(reconstructed).reconstruction
    holdout = x[7::8]
    assert result.error_before == pytest.approx(error(model, fitted, holdout), rel=1e-3)
    assert result.error_after == pytest.approx(error(model, reconstructed, holdout), rel=1e-3)
    assert [b.layers for b in result.blocks] == [("conv1", "conv2"), ("head",)]
    assert all(0 < b.steps <= 200 and b.error_after < b.error_before for b in result.blocks)
    assert report(fitted).reconstruction is None
    assert Report.from_dict(json.loads(json.dumps(report(reconstructed).to_dict()))) == report(reconstructed)


def test_only_weights_and_norm_means_change(residual):
    _, _, fitted, reconstructed = residual
    changed = {k for k, v in reconstructed.state_dict().items() if not torch.equal(v, fitted.state_dict()[k])}
    assert {k.split(".")[0] for k in changed} == {"conv1", "conv2", "head", "bn1", "bn2"}
    assert all("running_mean" in k for k in changed if "bn" in k)
    assert fitted.state_dict().keys() == reconstructed.state_dict().keys()


def test_a_reconstructed_model_is_saved_and_loaded(residual, tmp_path):
    _, x, _, reconstructed = residual
    loaded = load(save(reconstructed, tmp_path / "out"))
    assert torch.equal(loaded(x), reconstructed(x))
    assert report(loaded) == report(reconstructed)


def test_modes_flags_randomness_and_the_original_are_kept():
    model = nets.settle(nets.Residual()).train()
    model.conv1.weight.requires_grad_(False)
    x, before, state = nets.images(16), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fitted, reconstructed = (ghostify(model, calibration=x, reconstruct=k) for k in (False, True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in (*model.parameters(), *reconstructed.parameters()))
    flags = [[(n, p.requires_grad, type(p)) for n, p in m.named_parameters()] for m in (fitted, reconstructed)]
    assert flags[0] == flags[1]
    assert [m.training for m in fitted.modules()] == [m.training for m in reconstructed.modules()]
    assert not any(m._forward_hooks for m in reconstructed.modules())


@pytest.fixture(scope="module")
def seeded():
    torch.manual_seed(0)
    program = trace(nets.settle(nets.Straight()))
    chosen_plan = plan(program)
    fits = fit(program, chosen_plan, nets.images(64))
    return program, chosen_plan, fits, reconstruct_blocks(program, chosen_plan, fits, nets.images(64), seed=5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_same_seed_gives_the_same_model_in_every_gradient_mode(seeded, context):
    program, chosen_plan, fits, first = seeded
    with context():
        again = reconstruct_blocks(program, chosen_plan, fits, nets.images(64), seed=5)
    assert again[1] == first[1]
    assert again[1].error_after < again[1].error_before
    for name, weights in first[0].weights.items():
        assert torch.equal(weights.primary_weight, again[0].weights[name].primary_weight)
        assert torch.equal(weights.norm_shift, again[0].weights[name].norm_shift)


def test_everything_works_in_inference_mode():
    with torch.inference_mode():
        converted = ghostify(nets.settle(nets.Residual(16)), calibration=nets.images(128), reconstruct=True)
    assert report(converted).reconstruction.error_after < report(converted).reconstruction.error_before


@pytest.mark.parametrize("make", [*nets.ALL, Dense], ids=lambda c: c.__name__)
def test_every_structure_works_and_no_error_on_the_holdout_increases(make):
    model, x = nets.settle(make()), nets.images(32, 12)
    fitted, reconstructed = (ghostify(model, calibration=x.split(16), reconstruct=k) for k in (False, True))
    assert error(model, reconstructed, x[7::8]) <= error(model, fitted, x[7::8]) * (1 + 1e-5)
    result = report(reconstructed).reconstruction
    assert result.error_after <= result.error_before
    assert all(b.error_after <= b.error_before for b in result.blocks)


def test_dense_connections_are_split_into_several_blocks():
    program, x = trace(Dense().eval()), nets.images(32)
    chosen_plan = plan(program)
    _, result = reconstruct_blocks(program, chosen_plan, fit(program, chosen_plan, x), x, steps=20)
    assert len(result.blocks) > 2
    assert [n for b in result.blocks for n in b.layers] == [f"layers.{k}" for k in range(9)]
    assert any(b.error_after < b.error_before for b in result.blocks)


def test_several_inputs_and_outputs():
    model, x, scale = Forked().eval(), nets.images(128), torch.linspace(1, 2, 128)
    batches = [{"x": a, "scale": b} for a, b in zip(x.split(12), scale.split(12), strict=True)]
    fitted, reconstructed = (ghostify(model, calibration=batches, reconstruct=k) for k in (False, True))
    test = nets.images(32, seed=9), torch.ones(32)
    with torch.no_grad():
        expected, before, after = (m(*test) for m in (model, fitted, reconstructed))
    errors = [sum(relative_error(outputs[k], expected[k]) for k in expected) for outputs in (before, after)]
    assert errors[1] < errors[0]


def test_batches_that_cannot_be_split_are_used_whole():
    class Table(nets.Straight):
        def forward(self, x, table):
            return super().forward(x) + table.sum(0)

    batches = [(x, torch.ones(3, 5)) for x in nets.images(64).split(2)]
    result = report(ghostify(nets.settle(Table()), calibration=batches, reconstruct=True)).reconstruction
    assert result.error_after < result.error_before


def test_steps_that_increase_the_error_are_undone(monkeypatch):
    monkeypatch.setattr("ghostify.reconstruction.blockwise.LEARNING_RATE", 1e4)
    model, x = nets.settle(nets.Straight()), nets.images(16)
    fitted, reconstructed = (ghostify(model, calibration=x, reconstruct=k) for k in (False, True))
    assert [b.steps for b in report(reconstructed).reconstruction.blocks] == [0]
    assert all(torch.equal(v, fitted.state_dict()[k]) for k, v in reconstructed.state_dict().items())


def test_fits_are_not_changed_and_a_block_can_stop_early():
    program = trace(nets.settle(nets.Residual()))
    chosen_plan = plan(program, Policy((Rule(),)))
    fits = fit(program, chosen_plan, nets.images(16))
    kept = copy.deepcopy(fits.weights)
    better, result = reconstruct_blocks(program, chosen_plan, fits, nets.images(16), steps=3)
    assert all(torch.equal(fits.weights[k].norm_shift, kept[k].norm_shift) for k in ("conv1", "conv2"))
    assert {b.steps for b in result.blocks} <= {0, 3}
    assert rewrite(program, chosen_plan, better.weights)(nets.images()).isfinite().all()


def test_half_precision_is_trained_in_float32():
    model, x = nets.settle(nets.Straight(16)).bfloat16(), nets.images(64).bfloat16()
    result = report(ghostify(model, calibration=x, reconstruct=True)).reconstruction
    assert result.error_after < result.error_before


def test_no_images_or_no_holdout_is_an_error():
    with pytest.raises(GhostifyError, match="reconstruct: needs images"):
        ghostify(nets.settle(nets.Straight()), reconstruct=True)
    with pytest.raises(GhostifyError, match="holds out one of 8 images"):
        ghostify(nets.settle(nets.Straight()), calibration=nets.images(4), reconstruct=True)


def test_layers_without_gradient_are_not_changed():
    class Cut(nets.Straight):
        def forward(self, x):
            return super().forward(x).detach()

    result = report(ghostify(nets.settle(Cut()), calibration=nets.images(16), reconstruct=True)).reconstruction
    assert [b.steps for b in result.blocks] == [0]


def test_a_model_with_hooks_is_refused():
    model = nets.settle(nets.Straight())
    model.register_forward_pre_hook(lambda _, args: (args[0] / 2,))
    with pytest.raises(GhostifyError, match="reconstruct: does not run the model's own hooks"):
        ghostify(model, calibration=nets.images(8), reconstruct=True)
