import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ghostify.modules.ghost import GhostModule, build_ghost_module, is_channels_last
from ghostify.modules.layout import Depthwise, GhostLayout, Grouped, Pointwise


def test_order_is_the_position_of_each_channel_in_the_concatenation():
    primary, cheap = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1, groups=2, bias=False)
    primary.weight.data = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)
    cheap.weight.data = torch.tensor([10.0, 10.0]).reshape(2, 1, 1, 1)
    ghost = GhostModule(primary, cheap, torch.tensor([2, 0, 3, 1]))
    assert ghost(torch.ones(1, 1, 1, 1)).flatten().tolist() == [10, 1, 20, 2]


def test_a_ghost_module_has_the_attributes_of_the_convolution():
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


def test_the_strides_decide_the_memory_format_of_1_x_1_filters():
    conv = nn.Conv2d(4, 8, 1)
    contiguous = build_ghost_module(conv, GhostLayout(8, 4, Pointwise()))
    channels_last = build_ghost_module(conv.to(memory_format=torch.channels_last), GhostLayout(8, 4, Pointwise()))
    assert conv.weight.is_contiguous()
    assert not is_channels_last(contiguous.primary_conv.weight)
    assert is_channels_last(channels_last.primary_conv.weight)
    assert channels_last.primary_conv.weight.stride() == conv.weight[:4].stride()


def test_attributes_of_a_convolution_are_forwarded_to_the_primary_one():
    ghost = build_ghost_module(nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2), GhostLayout(8, 4, Depthwise(3)))
    assert (ghost.stride, ghost.kernel_size, ghost.dilation, ghost.in_channels) == ((2, 2), (3, 3), (2, 2), 4)
    assert ghost.weight is ghost.primary_conv.weight
    with pytest.raises(AttributeError, match="no attribute 'groups'"):
        _ = ghost.groups


LAYOUTS = [
    GhostLayout(8, 4, Depthwise(3)),
    GhostLayout(7, 4, Depthwise(3)),
    GhostLayout(8, 3, Depthwise(1)),
    GhostLayout(8, 3, Pointwise()),
    GhostLayout(8, 4, Grouped(2, 3)),
]


def random_ghost(layout, bias=True, order=True, dtype=torch.float64):
    torch.manual_seed(0)
    ghost = build_ghost_module(nn.Conv2d(3, layout.outputs, 3, padding=1, bias=bias, dtype=dtype), layout)
    for parameter in ghost.parameters():
        nn.init.normal_(parameter)
    ghost.order = torch.randperm(layout.outputs) if order else None
    return ghost


def gradients(ghost, x, cast=lambda output: output):
    x = x.clone().requires_grad_()
    output = cast(ghost(x))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    return output, torch.autograd.grad((output.square() * weights).sum(), [x, *ghost.parameters()])


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_recomputed_ghosts_have_the_same_gradients(layout, bias, order):
    ghost, x = random_ghost(layout, bias, order), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        ghost.recompute = False
        expected_output, expected = gradients(ghost, images)
        ghost.recompute = True
        output, actual = gradients(ghost, images)
        assert torch.equal(expected_output, output)
        torch.testing.assert_close(actual, expected)


def test_recomputed_ghosts_have_second_derivatives_and_frozen_parameters():
    ghost, x = random_ghost(LAYOUTS[1]), torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    ghost.recompute = True
    assert torch.autograd.gradcheck(ghost, x)
    assert torch.autograd.gradgradcheck(ghost, x)
    for parameter in ghost.cheap_operation.parameters():
        parameter.requires_grad_(False)
    ghost(x).sum().backward()
    assert ghost.primary_conv.weight.grad is not None


def test_recomputed_ghosts_under_autocast():
    ghost, x = random_ghost(LAYOUTS[0], dtype=torch.float32), torch.randn(2, 3, 6, 6)
    results = []
    for ghost.recompute in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(ghost, x, lambda output: output.float()))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0.05, atol=0.5)
    assert all(g.dtype == torch.float32 for g in results[1][1])


def saved_bytes(model, x):
    """Bytes that autograd stores for the backward, each storage once."""
    storage_bytes = {}

    def record(tensor):
        storage_bytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        output = model(x)
    return sum(storage_bytes.values()), output


@pytest.mark.parametrize(
    "layout",
    [GhostLayout(64, 32, Depthwise(3)), GhostLayout(64, 24, Depthwise(3)), GhostLayout(64, 32, Pointwise())],
    ids=str,
)
def test_training_stores_no_more_than_with_the_convolution(layout):
    conv, norm, x = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), torch.randn(4, 3, 16, 16)
    ghost = build_ghost_module(conv, layout)
    original, _ = saved_bytes(nn.Sequential(conv, norm), x)
    stored, _ = saved_bytes(nn.Sequential(ghost, norm), x)
    ghost.recompute = True
    recomputed, _ = saved_bytes(nn.Sequential(ghost, norm), x)
    assert recomputed <= original + 4096 < stored


def test_overwriting_the_output_is_an_error():
    ghost = random_ghost(LAYOUTS[0])
    ghost.recompute = True
    output = ghost(torch.randn(1, 3, 6, 6, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="inplace operation"):
        output.relu_().sum().backward()


def test_hooks_and_parametrizations_turn_recomputation_off():
    ghost, x = random_ghost(LAYOUTS[0], order=False), torch.randn(1, 3, 6, 6, dtype=torch.float64)
    ghost.recompute = True
    calls = []
    ghost.cheap_operation.register_forward_hook(lambda *_: calls.append(1))
    ghost(x).sum().backward()
    assert len(calls) == 1
    weighted = random_ghost(LAYOUTS[0], order=False)
    weighted.recompute = True
    nn.utils.parametrizations.weight_norm(weighted.cheap_operation)
    weighted(x).sum().backward()
    assert weighted.cheap_operation.parametrizations.weight.original0.grad is not None


def test_recomputing_modules_trace_and_export_like_others():
    ghost = random_ghost(LAYOUTS[0], dtype=torch.float32)
    ghost.recompute = True
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(torch.fx.symbolic_trace(ghost)(x), ghost(x))
    exported = torch.export.export(ghost.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), ghost(x))


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_transforms_of_torch_func_see_the_same_function(layout, order):
    ghost, x = random_ghost(layout, order=order), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    ghost.recompute = True
    weights = {k: v.detach() for k, v in ghost.named_parameters()}

    def loss(weights, images):
        return torch.func.functional_call(ghost, weights, (images,)).square().sum()

    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        expected = torch.autograd.grad(ghost(images).square().sum(), list(ghost.parameters()))
        torch.testing.assert_close(list(torch.func.grad(loss)(weights, images).values()), list(expected))
        per_image = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, images[:, None])
        torch.testing.assert_close([g.sum(0) for g in per_image.values()], list(expected))
        torch.testing.assert_close(torch.func.vmap(lambda one: ghost(one[None])[0])(images), ghost(images))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own, on the first use of jacfwd
def test_jacobians_and_forward_derivatives_go_through_recomputed_ghosts():
    ghost, x = random_ghost(LAYOUTS[1]), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    ghost.recompute = True
    backward, forward = torch.func.jacrev(ghost)(x), torch.func.jacfwd(ghost)(x)
    torch.testing.assert_close(backward, forward)
    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(ghost(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(tangent, (backward * direction).sum((-4, -3, -2, -1)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_have_the_same_gradients(reentrant):
    ghost, x = random_ghost(LAYOUTS[0]), torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    ghost.recompute = True
    block = nn.Sequential(ghost, nn.BatchNorm2d(8, dtype=torch.float64), nn.ReLU())
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close([x.grad, *(p.grad for p in block.parameters())], list(expected))


def test_compiled_transforms_go_through_ghosts_in_one_graph():
    ghost, x = random_ghost(LAYOUTS[1]), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    ghost.recompute = True
    per_image = torch.func.vmap(lambda one: ghost(one[None])[0])
    compiled = torch.compile(per_image, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), ghost(x))
