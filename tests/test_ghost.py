import pytest
import torch
from torch import nn

from ghostify.modules.ghost import GhostModule, build_ghost_module, is_channels_last
from ghostify.modules.layout import Depthwise, GhostLayout, Grouped, Pointwise


def test_order_says_where_each_channel_was_computed():
    primary, cheap = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1, groups=2, bias=False)
    primary.weight.data = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)
    cheap.weight.data = torch.tensor([10.0, 10.0]).reshape(2, 1, 1, 1)
    ghost = GhostModule(primary, cheap, torch.tensor([2, 0, 3, 1]))
    assert ghost(torch.ones(1, 1, 1, 1)).flatten().tolist() == [10, 1, 20, 2]


def test_ghost_of_carries_attributes_over():
    conv = nn.Conv2d(4, 8, (3, 1), (2, 1), (1, 0), (1, 2), padding_mode="reflect", dtype=torch.float64)
    conv.weight.requires_grad_(False)
    conv.eval().to(memory_format=torch.channels_last)
    ghost = build_ghost_module(conv, GhostLayout(8, 4, Depthwise(3)))
    primary = ghost.primary_conv
    for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode", "in_channels"):
        assert getattr(primary, name) == getattr(conv, name)
    assert primary.weight.dtype == ghost.cheap_operation.weight.dtype == torch.float64
    assert not primary.weight.requires_grad
    assert primary.bias.requires_grad
    assert ghost.cheap_operation.bias is not None
    assert not ghost.training
    assert conv.out_channels == 8
    assert conv.weight.shape[0] == 8


def test_the_layout_of_1_x_1_filters_is_told_by_their_strides():
    conv = nn.Conv2d(4, 8, 1)
    plain = build_ghost_module(conv, GhostLayout(8, 4, Pointwise()))
    last = build_ghost_module(conv.to(memory_format=torch.channels_last), GhostLayout(8, 4, Pointwise()))
    assert conv.weight.is_contiguous()
    assert not is_channels_last(plain.primary_conv.weight)
    assert is_channels_last(last.primary_conv.weight)
    assert last.primary_conv.weight.stride() == conv.weight[:4].stride()


def test_what_forwards_ask_a_convolution_for_is_answered():
    ghost = build_ghost_module(nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2), GhostLayout(8, 4, Depthwise(3)))
    assert (ghost.stride, ghost.kernel_size, ghost.dilation, ghost.in_channels) == ((2, 2), (3, 3), (2, 2), 4)
    assert ghost.weight is ghost.primary_conv.weight
    with pytest.raises(AttributeError, match="no attribute 'groups'"):
        _ = ghost.groups


SHAPES = [
    GhostLayout(8, 4, Depthwise(3)),
    GhostLayout(7, 4, Depthwise(3)),
    GhostLayout(8, 3, Depthwise(1)),
    GhostLayout(8, 3, Pointwise()),
    GhostLayout(8, 4, Grouped(2, 3)),
]


def filled(layout, bias=True, order=True, dtype=torch.float64):
    torch.manual_seed(0)
    ghost = build_ghost_module(nn.Conv2d(3, layout.outputs, 3, padding=1, bias=bias, dtype=dtype), layout)
    for parameter in ghost.parameters():
        nn.init.normal_(parameter)
    ghost.order = torch.randperm(layout.outputs) if order else None
    return ghost


def gradients(ghost, x, how=lambda made: made):
    x = x.clone().requires_grad_()
    made = how(ghost(x))
    weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(0)).to(made)
    return made, torch.autograd.grad((made.square() * weights).sum(), [x, *ghost.parameters()])


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", SHAPES, ids=str)
def test_recomputed_ghosts_have_the_same_gradients(layout, bias, order):
    ghost, x = filled(layout, bias, order), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        ghost.recompute = False
        made, wanted = gradients(ghost, images)
        ghost.recompute = True
        again, found = gradients(ghost, images)
        assert torch.equal(made, again)
        torch.testing.assert_close(found, wanted)


def test_recomputed_ghosts_have_second_derivatives_and_frozen_parts():
    ghost, x = filled(SHAPES[1]), torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    ghost.recompute = True
    assert torch.autograd.gradcheck(ghost, x)
    assert torch.autograd.gradgradcheck(ghost, x)
    for parameter in ghost.cheap_operation.parameters():
        parameter.requires_grad_(False)
    ghost(x).sum().backward()
    assert ghost.primary_conv.weight.grad is not None


def test_recomputed_ghosts_under_autocast():
    ghost, x = filled(SHAPES[0], dtype=torch.float32), torch.randn(2, 3, 6, 6)
    both = []
    for ghost.recompute in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            both.append(gradients(ghost, x, lambda made: made.float()))
    assert torch.equal(both[0][0], both[1][0])
    torch.testing.assert_close(both[1][1], both[0][1], rtol=0.05, atol=0.5)
    assert all(g.dtype == torch.float32 for g in both[1][1])


def kept(model, x):
    """Bytes that autograd keeps for the backward, each storage once."""
    found = {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        made = model(x)
    return sum(found.values()), made


@pytest.mark.parametrize(
    "layout",
    [GhostLayout(64, 32, Depthwise(3)), GhostLayout(64, 24, Depthwise(3)), GhostLayout(64, 32, Pointwise())],
    ids=str,
)
def test_training_keeps_no_more_than_with_the_convolution(layout):
    conv, norm, x = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), torch.randn(4, 3, 16, 16)
    ghost = build_ghost_module(conv, layout)
    before, _ = kept(nn.Sequential(conv, norm), x)
    ordinary, _ = kept(nn.Sequential(ghost, norm), x)
    ghost.recompute = True
    after, _ = kept(nn.Sequential(ghost, norm), x)
    assert after <= before + 4096 < ordinary


def test_an_overwritten_output_is_noticed():
    ghost = filled(SHAPES[0])
    ghost.recompute = True
    made = ghost(torch.randn(1, 3, 6, 6, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="inplace operation"):
        made.relu_().sum().backward()


def test_what_is_no_plain_convolution_any_more_goes_the_ordinary_way():
    ghost, x = filled(SHAPES[0], order=False), torch.randn(1, 3, 6, 6, dtype=torch.float64)
    ghost.recompute = True
    calls = []
    ghost.cheap_operation.register_forward_hook(lambda *_: calls.append(1))
    ghost(x).sum().backward()
    assert len(calls) == 1
    weighted = filled(SHAPES[0], order=False)
    weighted.recompute = True
    nn.utils.parametrizations.weight_norm(weighted.cheap_operation)
    weighted(x).sum().backward()
    assert weighted.cheap_operation.parametrizations.weight.original0.grad is not None


def test_recomputing_modules_trace_and_save_like_others():
    ghost = filled(SHAPES[0], dtype=torch.float32)
    ghost.recompute = True
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(torch.fx.symbolic_trace(ghost)(x), ghost(x))
    exported = torch.export.export(ghost.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), ghost(x))
