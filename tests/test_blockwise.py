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
    """Every layer reads all before it: no place where one value alone is live."""

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


def test_the_error_falls_on_images_that_nobody_saw():
    model, x, test = nets.settle(nets.Straight(16)), nets.images(64, 12), nets.images(32, 12, seed=9)
    plain, rebuilt = (ghostify(model, calibration=x.split(32), reconstruct=k) for k in (False, True))
    assert error(model, rebuilt, test) < 0.7 * error(model, plain, test)


def test_the_report_tells_the_error_on_held_out_images(residual):
    model, x, plain, rebuilt = residual
    done = report(rebuilt).reconstruction
    held = x[7::8]
    assert done.error_before == pytest.approx(error(model, plain, held), rel=1e-3)
    assert done.error_after == pytest.approx(error(model, rebuilt, held), rel=1e-3)
    assert [b.layers for b in done.blocks] == [("conv1", "conv2"), ("head",)]
    assert all(0 < b.steps <= 200 and b.error_after < b.error_before for b in done.blocks)
    assert report(plain).reconstruction is None
    assert Report.from_dict(json.loads(json.dumps(report(rebuilt).to_dict()))) == report(rebuilt)


def test_only_weights_and_norm_means_change(residual):
    _, _, plain, rebuilt = residual
    changed = {k for k, v in rebuilt.state_dict().items() if not torch.equal(v, plain.state_dict()[k])}
    assert {k.split(".")[0] for k in changed} == {"conv1", "conv2", "head", "bn1", "bn2"}
    assert all("running_mean" in k for k in changed if "bn" in k)
    assert plain.state_dict().keys() == rebuilt.state_dict().keys()


def test_a_rebuilt_model_survives_the_disk(residual, tmp_path):
    _, x, _, rebuilt = residual
    loaded = load(save(rebuilt, tmp_path / "out"))
    assert torch.equal(loaded(x), rebuilt(x))
    assert report(loaded) == report(rebuilt)


def test_modes_flags_randomness_and_the_original_are_kept():
    model = nets.settle(nets.Residual()).train()
    model.conv1.weight.requires_grad_(False)
    x, before, state = nets.images(16), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plain, rebuilt = (ghostify(model, calibration=x, reconstruct=k) for k in (False, True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in (*model.parameters(), *rebuilt.parameters()))
    flags = [[(n, p.requires_grad, type(p)) for n, p in m.named_parameters()] for m in (plain, rebuilt)]
    assert flags[0] == flags[1]
    assert [m.training for m in plain.modules()] == [m.training for m in rebuilt.modules()]
    assert not any(m._forward_hooks for m in rebuilt.modules())


@pytest.fixture(scope="module")
def seeded():
    torch.manual_seed(0)
    program = trace(nets.settle(nets.Straight()))
    decided = plan(program)
    fits = fit(program, decided, nets.images(64))
    return program, decided, fits, reconstruct_blocks(program, decided, fits, nets.images(64), seed=5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_same_seed_gives_the_same_model_wherever_it_is_called(seeded, context):
    program, decided, fits, first = seeded
    with context():
        again = reconstruct_blocks(program, decided, fits, nets.images(64), seed=5)
    assert again[1] == first[1]
    assert again[1].error_after < again[1].error_before
    for name, weights in first[0].weights.items():
        assert torch.equal(weights.primary_weight, again[0].weights[name].primary_weight)
        assert torch.equal(weights.shift, again[0].weights[name].norm_shift)


def test_everything_works_in_inference_mode():
    with torch.inference_mode():
        converted = ghostify(nets.settle(nets.Residual(16)), calibration=nets.images(128), reconstruct=True)
    assert report(converted).reconstruction.error_after < report(converted).reconstruction.error_before


@pytest.mark.parametrize("make", [*nets.ALL, Dense], ids=lambda c: c.__name__)
def test_every_wiring_works_and_none_gets_worse_on_held_out_images(make):
    model, x = nets.settle(make()), nets.images(32, 12)
    plain, rebuilt = (ghostify(model, calibration=x.split(16), reconstruct=k) for k in (False, True))
    assert error(model, rebuilt, x[7::8]) <= error(model, plain, x[7::8]) * (1 + 1e-5)
    done = report(rebuilt).reconstruction
    assert done.error_after <= done.error_before
    assert all(b.error_after <= b.error_before for b in done.blocks)


def test_dense_connections_fall_into_several_blocks():
    done = report(ghostify(Dense().eval(), calibration=nets.images(32), reconstruct=True)).reconstruction
    assert len(done.blocks) > 2
    assert [n for b in done.blocks for n in b.layers] == [f"layers.{k}" for k in range(9)]
    assert any(b.error_after < b.error_before for b in done.blocks)


def test_several_inputs_and_outputs():
    model, x, scale = Forked().eval(), nets.images(128), torch.linspace(1, 2, 128)
    batches = [{"x": a, "scale": b} for a, b in zip(x.split(12), scale.split(12), strict=True)]
    plain, rebuilt = (ghostify(model, calibration=batches, reconstruct=k) for k in (False, True))
    test = nets.images(32, seed=9), torch.ones(32)
    with torch.no_grad():
        wanted, before, after = (m(*test) for m in (model, plain, rebuilt))
    errors = [sum(relative_error(made[key], wanted[key]) for key in wanted) for made in (before, after)]
    assert errors[1] < errors[0]


def test_batches_that_cannot_be_taken_apart_stay_whole():
    class Table(nets.Straight):
        def forward(self, x, table):
            return super().forward(x) + table.sum(0)

    batches = [(x, torch.ones(3, 5)) for x in nets.images(64).split(2)]
    done = report(ghostify(nets.settle(Table()), calibration=batches, reconstruct=True)).reconstruction
    assert done.error_after < done.error_before


def test_a_step_too_wide_is_taken_back(monkeypatch):
    monkeypatch.setattr("ghostify.reconstruction.blockwise.RATE", 1e4)
    model, x = nets.settle(nets.Straight()), nets.images(16)
    plain, rebuilt = (ghostify(model, calibration=x, reconstruct=k) for k in (False, True))
    assert [b.steps for b in report(rebuilt).reconstruction.blocks] == [0]
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in rebuilt.state_dict().items())


def test_fits_are_not_written_to_and_a_block_can_stop_early():
    program = trace(nets.settle(nets.Residual()))
    decided = plan(program, Policy((Rule(),)))
    fits = fit(program, decided, nets.images(16))
    kept = copy.deepcopy(fits.weights)
    better, done = reconstruct_blocks(program, decided, fits, nets.images(16), steps=3)
    assert all(torch.equal(fits.weights[k].norm_shift, kept[k].norm_shift) for k in ("conv1", "conv2"))
    assert {b.steps for b in done.blocks} <= {0, 3}
    assert rewrite(program, decided, better.weights)(nets.images()).isfinite().all()


def test_half_precision_is_trained_in_single():
    model, x = nets.settle(nets.Straight(16)).bfloat16(), nets.images(64).bfloat16()
    done = report(ghostify(model, calibration=x, reconstruct=True)).reconstruction
    assert done.error_after < done.error_before


def test_it_refuses_without_images_or_with_none_to_judge_by():
    with pytest.raises(GhostifyError, match="reconstruct: needs images"):
        ghostify(nets.settle(nets.Straight()), reconstruct=True)
    with pytest.raises(GhostifyError, match="every 8th calibration image: pass at least 8"):
        ghostify(nets.settle(nets.Straight()), calibration=nets.images(4), reconstruct=True)


def test_what_has_no_gradient_is_left_as_it_is():
    class Cut(nets.Straight):
        def forward(self, x):
            return super().forward(x).detach()

    done = report(ghostify(nets.settle(Cut()), calibration=nets.images(16), reconstruct=True)).reconstruction
    assert [b.steps for b in done.blocks] == [0]
