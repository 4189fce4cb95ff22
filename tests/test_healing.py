"""`ghostify.healing`."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from ghostify import Healing, ghostify, report
from ghostify.errors import GhostifyError
from ghostify.fitting.sensitivity import prepare_calibration
from ghostify.graph.tracing import trace
from ghostify.healing import distillation
from ghostify.healing.augmentation import augment, can_augment
from ghostify.healing.distillation import heal
from ghostify.healing.image_sampler import holdout_pieces, training_samples
from ghostify.healing.last_maps import last_maps
from ghostify.healing.trained_parameters import trained_parameters
from ghostify.numerics import relative_squared_error

STEPS = Healing(steps=30, batch=8, precision="fp32")


class Net(nn.Sequential):
    def __init__(self) -> None:
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)]
        super().__init__(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images() -> list[Tensor]:
    return list(torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)).split(16))


def test_healing_lowers_the_error_on_unseen_images(net: nn.Module, images: list[Tensor]) -> None:
    unseen = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    plain, healed = (
        ghostify(net, targets="2", ratio=4, example_inputs=images[0][:1], calibration=images, heal=settings)
        for settings in (None, STEPS)
    )
    with torch.no_grad():
        expected = net(unseen)
        errors = [float(relative_squared_error(model(unseen), expected)) for model in (plain, healed)]
    assert errors[1] < 0.8 * errors[0]
    healing = report(healed).healing
    assert healing is not None
    assert healing.steps == 30
    assert healing.error_after < healing.error_before


def test_the_same_steps_give_the_same_weights(net: nn.Module, images: list[Tensor]) -> None:
    first, second = (ghostify(net, ratio=2, calibration=images, heal=STEPS, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_norms_keep_their_statistics_and_the_original_its_weights(net: nn.Module, images: list[Tensor]) -> None:
    before = copy.deepcopy(net.state_dict())
    healed = ghostify(net, targets="2", ratio=2, calibration=images, heal=STEPS)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(healed.get_buffer("3.running_var"), net.get_buffer("3.running_var"))


def test_weights_are_kept_where_no_step_lowers_the_error_on_the_holdout(
    net: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = trace(net, images[0][:1])
    converted, prepared = copy.deepcopy(program.module), prepare_calibration(program, images)
    errors = iter([1.0, *[2.0] * 100])
    monkeypatch.setattr(distillation._DistillationLoss, "error", lambda *_: next(errors))
    with torch.no_grad():
        converted.get_parameter("2.weight").mul_(1.5)
    before = [p.clone() for p in converted.parameters()]
    result = heal(program.module, converted, prepared, STEPS)
    assert (result.error_before, result.error_after) == (1.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, converted.parameters(), strict=True))


def test_a_rate_that_is_too_high_is_lowered(net: nn.Module, images: list[Tensor]) -> None:
    settings = Healing(steps=60, batch=8, learning_rate=1.0, precision="fp32")
    healed = ghostify(net, targets="2", ratio=4, calibration=images, heal=settings)
    healing = report(healed).healing
    assert healing is not None
    assert healing.error_after < healing.error_before


def test_seconds_limit_the_steps(net: nn.Module, images: list[Tensor]) -> None:
    healing = report(ghostify(net, ratio=2, calibration=images, heal=0.2)).healing
    assert healing is not None
    assert 1 <= healing.steps < 10_000


def test_healing_trains_pruned_layers(net: nn.Module, images: list[Tensor]) -> None:
    model = ghostify(
        net,
        prune=True,
        budget={"macs": 0.7},
        example_inputs=images[0][:1],
        calibration=images,
        heal=Healing(steps=100, batch=8, learning_rate=1e-2),
    )
    healing = report(model).healing
    assert healing is not None
    assert healing.error_after < healing.error_before


def test_healing_needs_images(net: nn.Module, images: list[Tensor]) -> None:
    with pytest.raises(GhostifyError, match="heal: needs images"):
        ghostify(net, heal=60)
    with pytest.raises(GhostifyError, match="heal: holds out one of 8 images"):
        ghostify(net, ratio=2, calibration=[images[0][:1]], heal=60)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "heal: has no limit"), ({"seconds": -1}, "heal: seconds"), ({"steps": 1, "precision": "int8"}, "precision")],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(GhostifyError, match=message):
        Healing(**settings)  # type: ignore[arg-type]


def test_samples_hold_each_training_image_once_a_pass(net: nn.Module, images: list[Tensor]) -> None:
    numbers = torch.arange(64.0)[:, None, None, None]
    numbered = list((0 * torch.cat(images) + numbers).split(16))
    batches = prepare_calibration(trace(net, images[0][:1]), numbered).batches
    held_out = {int(v) for piece in holdout_pieces(batches) for v in piece.inputs.values[0][:, 0, 0, 0]}  # type: ignore[union-attr]
    samples, seen = training_samples(batches, 16, seed=0), list[int]()
    while len(seen) < 64 - len(held_out):
        seen += [int(v) for v in next(samples).inputs.values[0][:, 0, 0, 0]]  # type: ignore[union-attr]
    assert len(held_out) == 8
    assert sorted(seen) == sorted(set(range(64)) - held_out)


def test_augmented_images_differ_and_keep_their_range() -> None:
    images = torch.linspace(0, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    changed = augment(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert not torch.equal(changed, images)
    assert float(changed.min()) > -0.5
    assert float(changed.max()) < 1.5
    assert can_augment(images)
    assert not can_augment(torch.zeros(2, 64, 32, 32))
    assert not can_augment(torch.zeros(2, 3, 8, 8))


def test_last_maps_are_those_before_pooling_where_both_models_agree(net: nn.Module, images: list[Tensor]) -> None:
    def run(model: nn.Module) -> Tensor:
        return model(images[0])

    other = copy.deepcopy(net)
    assert last_maps(net, other, run).path == "4"
    nn.init.normal_(other.get_parameter("2.weight"))
    assert last_maps(net, other, run).path is None


def test_rates_follow_the_size_of_the_weights(net: nn.Module, images: list[Tensor]) -> None:
    rates = {id(p): rate for p, rate in trained_parameters(net, lambda model: model(images[0]), 0.1)}
    weight, bias = net.get_parameter("7.weight"), net.get_parameter("7.bias")
    size = float(weight.detach().square().mean().sqrt())
    assert rates[id(weight)] == pytest.approx(0.1 * size)
    assert rates[id(bias)] == pytest.approx(0.1 * size * math.sqrt(16))
