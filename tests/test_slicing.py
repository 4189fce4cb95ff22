import pytest
import torch
from torch import nn

from ghostify.pruning.slicing import slice_conv, slice_norm

KEPT = (5, 0, 3)


@pytest.mark.parametrize("bias", [True, False])
def test_a_producer_makes_some_of_its_maps(bias):
    conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=bias), torch.randn(2, 4, 9, 9)
    small = slice_conv(conv, KEPT, None)
    torch.testing.assert_close(small(x), conv(x)[:, KEPT])
    assert (small.in_channels, small.out_channels) == (4, 3)
    assert conv.out_channels == 6


def test_a_consumer_reads_some_of_its_maps():
    conv, x = nn.Conv2d(6, 4, 3, dilation=2), torch.randn(2, 6, 9, 9)
    small = slice_conv(conv, None, KEPT)
    without = x.clone()
    without[:, [1, 2, 4]] = 0
    torch.testing.assert_close(small(x[:, KEPT]), conv(without))


def test_a_depthwise_one_does_both():
    conv, x = nn.Conv2d(6, 6, 3, groups=6), torch.randn(2, 6, 9, 9)
    small = slice_conv(conv, KEPT, KEPT)
    torch.testing.assert_close(small(x[:, KEPT]), conv(x)[:, KEPT])
    assert (small.groups, small.in_channels) == (3, 3)


def test_a_norm_of_some_maps_shares_nothing_with_the_whole():
    norm, x = nn.BatchNorm2d(6).eval(), torch.randn(2, 6, 4, 4)
    norm.running_mean.normal_()
    with torch.no_grad():
        norm.weight.normal_()
    small = slice_norm(norm, KEPT)
    torch.testing.assert_close(small(x[:, KEPT]), norm(x)[:, KEPT])
    before = norm.weight.clone()
    small.weight.data.zero_()
    assert torch.equal(norm.weight, before)
    assert small.num_batches_tracked.dim() == 0


def test_what_a_channel_has_of_its_own_goes_with_it():
    act, x = nn.PReLU(6), torch.randn(2, 6, 4, 4)
    nn.init.uniform_(act.weight)
    small = slice_norm(nn.Sequential(nn.BatchNorm2d(6), act, nn.PReLU()).eval(), KEPT)
    torch.testing.assert_close(small[1](x[:, KEPT]), act(x)[:, KEPT])
    assert (small[0].num_features, small[1].num_parameters, small[2].num_parameters) == (3, 3, 1)


def test_the_layout_of_weights_stays():
    conv = nn.Conv2d(8, 12, 3).to(memory_format=torch.channels_last)
    for keeps, reads in (([1, 3], None), (None, [0, 2, 5]), ([1, 3], [0, 2, 5])):
        weight = slice_conv(conv, keeps, reads).weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
