"""Ways in which users call, copy and wrap models: the converted one goes along."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn

from ghostify import ghostify, load, report, save
from tests import nets

EVERY = pytest.mark.parametrize("make", [*nets.ALL, nets.Wild], ids=lambda c: c.__name__)


def pair(make=nets.Residual, **options):
    model = nets.settle(make())
    return model, ghostify(model, targets="*", example_inputs=nets.images(2), **options)


@EVERY
def test_modes_reach_every_module(make):
    _, made = pair(make)
    for mode in (True, False):
        made.train(mode)
        assert all(m.training is mode for m in made.modules())


@EVERY
def test_it_runs_at_sizes_and_batches_that_it_was_not_traced_at(make):
    model, made = pair(make)
    for count, size in ((1, 12), (5, 16), (2, 20)):
        x = nets.images(count, size)
        wanted = model(x)
        assert made(x).shape == wanted.shape


@EVERY
def test_under_inference_mode_it_converts_and_runs(make):
    with torch.inference_mode():
        model, x = nets.settle(make()), nets.images(2)
        made = ghostify(model, example_inputs=x, calibration=[x])
        assert torch.isfinite(made(x)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_stay(dtype):
    model, x = nets.settle(nets.Residual()).to(dtype), nets.images(64).to(dtype)
    made = ghostify(model, example_inputs=x, calibration=[x], cheap="pointwise")
    assert made(x).dtype == dtype
    assert {p.dtype for p in made.parameters()} == {dtype}
    difference = (made(x).double() - model(x).double()).square().sum()
    assert difference < 0.3 * model(x).double().var() * made(x).numel()


def test_a_converted_model_follows_to_another_precision():
    _, made = pair()
    x = nets.images(2)
    wanted = made(x)
    torch.testing.assert_close(made.double()(x.double()).float(), wanted)


def test_data_parallel_before_and_after():
    model, x = nets.settle(nets.Straight()), nets.images(2)
    wanted = ghostify(model, example_inputs=x)(x)
    assert torch.equal(nn.DataParallel(ghostify(model, example_inputs=x))(x), wanted)
    inside = ghostify(nn.DataParallel(model), example_inputs=x)
    assert torch.equal(inside(x), wanted)
    assert report(inside).rewritten == report(ghostify(model)).rewritten


def test_an_average_of_weights_follows():
    _, made = pair()
    average = ModelEmaV3(made, decay=0.5)
    x = nets.images(2)
    assert torch.equal(average.module(x), made(x))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(2)
    average.update(made)
    first, other = next(average.module.parameters()), next(made.parameters())
    torch.testing.assert_close(first, 0.75 * other)


def test_distributed_training_takes_a_step(tmp_path):
    _, made = pair()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(made.train())
        wrapped(nets.images(4)).sum().backward()
        assert all(p.grad is not None for p in made.parameters())
        inside = ghostify(wrapped.eval(), 1, example_inputs=nets.images(2))
        assert torch.equal(inside(nets.images(2)), made(nets.images(2)))
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_it_computes_the_same():
    model, made = pair()
    x = nets.images(2)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x))
    again = ghostify(torch.compile(model, backend="eager"), targets="*", example_inputs=x)
    assert torch.equal(again(x), made(x))
    model.stem = torch.compile(model.stem, backend="eager")
    assert torch.equal(ghostify(model, targets="*", example_inputs=x)(x), made(x))


def test_copies_are_independent():
    _, made = pair()
    x = nets.images(2)
    before, other = made(x), copy.deepcopy(made)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(made(x), before)
    assert report(other) == report(made)


def test_a_model_in_training_mode_is_left_in_it():
    model = nets.settle(nets.Residual()).train()
    made = ghostify(model, example_inputs=nets.images(2))
    assert made.training
    assert model.training
    x = nets.images(4)
    assert not torch.equal(made(x), made(x))  # stochastic depth draws


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
    made = ghostify(model, cheap="pointwise", example_inputs=x)
    assert report(made).rewritten == 1999
    assert torch.equal(load(save(made, tmp_path / "out"))(x), made(x))


def test_gradient_checkpointing_does_not_hinder():
    model = timm.create_model("resnet10t").eval()
    model.set_grad_checkpointing(True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ghostify(model, 1, example_inputs=x)(x), model(x))
