"""Ways in which users call, copy and wrap models, applied to converted ones."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn

from ghostify import ghostify, load, report, save
from tests import nets

EVERY_NET = pytest.mark.parametrize("make", [*nets.ALL, nets.Wild], ids=lambda c: c.__name__)


def pair(make=nets.Residual, **options):
    model = nets.settle(make())
    return model, ghostify(model, targets="*", example_inputs=nets.images(2), **options)


@EVERY_NET
def test_modes_reach_every_module(make):
    _, converted = pair(make)
    for mode in (True, False):
        converted.train(mode)
        assert all(m.training is mode for m in converted.modules())


@EVERY_NET
def test_it_runs_at_other_sizes_and_batches_than_it_was_traced_at(make):
    model, converted = pair(make)
    for count, size in ((1, 12), (5, 16), (2, 20)):
        x = nets.images(count, size)
        expected = model(x)
        assert converted(x).shape == expected.shape


@EVERY_NET
def test_under_inference_mode_it_converts_and_runs(make):
    with torch.inference_mode():
        model, x = nets.settle(make()), nets.images(2)
        converted = ghostify(model, example_inputs=x, calibration=[x])
        assert torch.isfinite(converted(x)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_stay(dtype):
    model, x = nets.settle(nets.Residual()).to(dtype), nets.images(64).to(dtype)
    converted = ghostify(model, example_inputs=x, calibration=[x], cheap="pointwise")
    assert converted(x).dtype == dtype
    assert {p.dtype for p in converted.parameters()} == {dtype}
    difference = (converted(x).double() - model(x).double()).square().sum()
    assert difference < 0.3 * model(x).double().var() * converted(x).numel()


def test_a_converted_model_can_be_cast_to_another_precision():
    _, converted = pair()
    x = nets.images(2)
    expected = converted(x)
    torch.testing.assert_close(converted.double()(x.double()).float(), expected)


def test_data_parallel_before_and_after():
    model, x = nets.settle(nets.Straight()), nets.images(2)
    expected = ghostify(model, example_inputs=x)(x)
    assert torch.equal(nn.DataParallel(ghostify(model, example_inputs=x))(x), expected)
    wrapped = ghostify(nn.DataParallel(model), example_inputs=x)
    assert torch.equal(wrapped(x), expected)
    assert report(wrapped).rewritten == report(ghostify(model)).rewritten


def test_an_average_of_weights_can_be_updated():
    _, converted = pair()
    average = ModelEmaV3(converted, decay=0.5)
    x = nets.images(2)
    assert torch.equal(average.module(x), converted(x))
    with torch.no_grad():
        for p in converted.parameters():
            p.mul_(2)
    average.update(converted)
    averaged, updated = next(average.module.parameters()), next(converted.parameters())
    torch.testing.assert_close(averaged, 0.75 * updated)


def test_distributed_training_takes_a_step(tmp_path):
    _, converted = pair()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(converted.train())
        wrapped(nets.images(4)).sum().backward()
        assert all(p.grad is not None for p in converted.parameters())
        unwrapped = ghostify(wrapped.eval(), 1, example_inputs=nets.images(2))
        assert torch.equal(unwrapped(nets.images(2)), converted(nets.images(2)))
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_it_computes_the_same():
    model, converted = pair()
    x = nets.images(2)
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), converted(x))
    from_compiled = ghostify(torch.compile(model, backend="eager"), targets="*", example_inputs=x)
    assert torch.equal(from_compiled(x), converted(x))
    model.stem = torch.compile(model.stem, backend="eager")
    assert torch.equal(ghostify(model, targets="*", example_inputs=x)(x), converted(x))


def test_copies_are_independent():
    _, converted = pair()
    x = nets.images(2)
    before, other = converted(x), copy.deepcopy(converted)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(converted(x), before)
    assert report(other) == report(converted)


def test_a_model_in_training_mode_stays_in_it():
    model = nets.settle(nets.Residual()).train()
    converted = ghostify(model, example_inputs=nets.images(2))
    assert converted.training
    assert model.training
    x = nets.images(4)
    assert not torch.equal(converted(x), converted(x))  # stochastic depth is random


@pytest.mark.slow
def test_two_thousand_convolutions(tmp_path):
    class Many(nn.Module):
        def __init__(self, count=2000):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(count))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x) * 1e-3
            return x

    model, x = Many().eval(), torch.randn(1, 4, 2, 2)
    converted = ghostify(model, cheap="pointwise", example_inputs=x)
    assert report(converted).rewritten == 1999
    assert torch.equal(load(save(converted, tmp_path / "out"))(x), converted(x))


def test_a_model_with_gradient_checkpointing_is_converted():
    model = timm.create_model("resnet10t").eval()
    model.set_grad_checkpointing(True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ghostify(model, 1, example_inputs=x)(x), model(x))
