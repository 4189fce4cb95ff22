"""Other methods of `benchmarks/experiments/compare.py`: exact where the filters have their form, within the limit."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.lib import rivals
from ghostify.cli.demo_network import ResidualNet
from ghostify.evaluation.metrics import predict, relative_error
from ghostify.planning.cost import count_macs
from tests.nets import settle


def network():
    torch.manual_seed(0)
    return settle(ResidualNet(8, 16))


def images(count=32):
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def calibration(count=32):
    labels = torch.arange(count) % 10
    return rivals.CalibrationImages(images(count).split(8), labels.split(8))


METHODS = [
    rivals.by_magnitude, rivals.by_taylor, rivals.by_least_squares, rivals.low_rank, rivals.tucker, rivals.decoupled,
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_smallest_ratio_keeps_within_the_limit(method, share):
    model, x = network(), images(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    original_macs = count_macs(model, x)
    compress = method(model, calibration())
    ratio = rivals.smallest_ratio(compress, lambda m: count_macs(m, x) / original_macs, share, steps=6)
    small = compress(ratio)
    assert 0.5 * share < count_macs(small, x) / original_macs <= share
    assert small(images(2)).shape == (2, 10)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in small.parameters())


def test_no_ratio_meets_an_infeasible_limit():
    assert rivals.smallest_ratio(rivals.low_rank(network(), calibration()), lambda _: 1.0, 0.5, steps=3) is None


def test_least_squares_brings_pruned_channels_nearer():
    model, x = network(), images(64)
    test = torch.randn(32, 1, 12, 12, generator=torch.Generator().manual_seed(2))
    calibrating = rivals.CalibrationImages(x.split(8))
    reference = predict(model, [test])
    outputs = [
        predict(method(model, calibrating)(0.3), [test]) for method in (rivals.by_magnitude, rivals.by_least_squares)
    ]
    errors = [relative_error(y, reference) for y in outputs]
    assert errors[1] < 0.5 * errors[0]


def test_least_squares_restores_changed_filters():
    """With all channels kept, the fit finds the original's filters again."""
    model = network()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for module in changed.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(1.3)
    kept = {n: torch.arange(m.out_channels) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    refitted = rivals.compensated(model, changed, kept, images(64).split(8))
    test = images(4)
    reference = predict(model, [test])
    assert (
        relative_error(predict(refitted, [test]), reference)
        < 1e-3
        < relative_error(predict(changed, [test]), reference)
    )


def conv_of(weight):
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], 2, 1)
    with torch.no_grad():
        conv.weight.copy_(weight)
    return conv


def factors(*shapes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    ("weight", "method"),
    [
        (torch.einsum("nr,rchw->nchw", *factors((16, 3), (3, 12, 3, 3))), lambda c: rivals._factored(c, 0.5)),
        (torch.einsum("nr,rqhw,qc->nchw", *factors((16, 4), (4, 3, 3, 3), (3, 12))), lambda c: rivals._tucker(c, 0.25)),
        (torch.einsum("cn,chw->nchw", *factors((12, 16), (12, 3, 3))), lambda c: rivals._decoupled(c, 1e-6)),
    ],
    ids=["low rank", "tucker", "decoupled"],
)
def test_factors_are_exact_where_the_filters_have_that_form(weight, method):
    conv = conv_of(weight)
    with torch.no_grad():
        small = method(conv)
    x = torch.randn(2, 12, 9, 9)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in conv.parameters())
    assert torch.allclose(small(x), conv(x), atol=1e-3)
