import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ghostify.ghost import GhostModule, Layout, feasible_width, ghost_of, intrinsic_maps, is_channels_last


@pytest.mark.parametrize(
    ("outputs", "ratio", "maps"), [(64, 2, 32), (65, 2, 33), (64, 3, 22), (64, 1.5, 43), (30, 1.2, 25)]
)
def test_intrinsic_maps_round_up(outputs, ratio, maps):
    assert intrinsic_maps(outputs, ratio) == maps


@given(st.integers(2, 40), st.data())
def test_layout_serves_every_ghost_once_and_capacities_add_up(outputs, data):
    intrinsic = data.draw(st.integers(1, outputs - 1))
    width = feasible_width(outputs, intrinsic, data.draw(st.integers(1, intrinsic)))
    layout = Layout(outputs, intrinsic, width, 3)
    assert sum(b.outputs for b in layout.blocks) == outputs - intrinsic == sum(layout.capacities)
    assert all((b.stop - b.start) % b.groups == b.outputs % b.groups == 0 for b in layout.blocks)
    assert len(layout.capacities) == intrinsic // width
    assert max(layout.capacities) - min(layout.capacities) <= 1
    conv = nn.Conv2d(3, outputs, 3)
    ghost = ghost_of(conv, layout)
    assert ghost(torch.randn(1, 3, 6, 6)).shape == conv(torch.randn(1, 3, 6, 6)).shape
    cheap = sum(p.numel() for n, p in ghost.cheap_operation.named_parameters() if n.endswith("weight"))
    assert cheap == layout.macs_per_position


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
    ghost = ghost_of(conv, Layout(8, 4, 1, 3))
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
    plain = ghost_of(conv, Layout(8, 4, 4, 1))
    last = ghost_of(conv.to(memory_format=torch.channels_last), Layout(8, 4, 4, 1))
    assert conv.weight.is_contiguous()
    assert not is_channels_last(plain.primary_conv.weight)
    assert is_channels_last(last.primary_conv.weight)
    assert last.primary_conv.weight.stride() == conv.weight[:4].stride()


def test_what_forwards_ask_a_convolution_for_is_answered():
    ghost = ghost_of(nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2), Layout(8, 4, 1, 3))
    assert (ghost.stride, ghost.kernel_size, ghost.dilation, ghost.in_channels) == ((2, 2), (3, 3), (2, 2), 4)
    assert ghost.weight is ghost.primary_conv.weight
    with pytest.raises(AttributeError, match="no attribute 'groups'"):
        _ = ghost.groups
