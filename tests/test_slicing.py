import pytest
import torch
from torch import nn

from ghostify.pruning.slicing import slice_conv, slice_norm

KEPT = (5, 0, 3)


@pytest.mark.parametrize("bias", [True, False])
def test_a_producer_computes_the_kept_maps(bias):
    conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=bias), torch.randn(2, 4, 9, 9)
    sliced = slice_conv(conv, KEPT, None)
    torch.testing.assert_close(sliced(x), conv(x)[:, KEPT])
    assert (sliced.in_channels, sliced.out_channels) == (4, 3)
    assert conv.out_channels == 6


def test_a_consumer_reads_the_kept_maps():
    conv, x = nn.Conv2d(6, 4, 3, dilation=2), torch.randn(2, 6, 9, 9)
    sliced = slice_conv(conv, None, KEPT)
    zeroed = x.clone()
    zeroed[:, [1, 2, 4]] = 0
    torch.testing.assert_close(sliced(x[:, KEPT]), conv(zeroed))


def test_a_depthwise_convolution_keeps_outputs_and_inputs():
    conv, x = nn.Conv2d(6, 6, 3, groups=6), torch.randn(2, 6, 9, 9)
    sliced = slice_conv(conv, KEPT, KEPT)
    torch.testing.assert_close(sliced(x[:, KEPT]), conv(x)[:, KEPT])
    assert (sliced.groups, sliced.in_channels) == (3, 3)


def test_a_sliced_norm_shares_no_tensor_with_the_original():
    norm, x = nn.BatchNorm2d(6).eval(), torch.randn(2, 6, 4, 4)
    norm.running_mean.normal_()
    with torch.no_grad():
        norm.weight.normal_()
    sliced = slice_norm(norm, KEPT)
    torch.testing.assert_close(sliced(x[:, KEPT]), norm(x)[:, KEPT])
    before = norm.weight.clone()
    sliced.weight.data.zero_()
    assert torch.equal(norm.weight, before)
    assert sliced.num_batches_tracked.dim() == 0


def test_parameters_per_channel_are_sliced():
    act, x = nn.PReLU(6), torch.randn(2, 6, 4, 4)
    nn.init.uniform_(act.weight)
    sliced = slice_norm(nn.Sequential(nn.BatchNorm2d(6), act, nn.PReLU()).eval(), KEPT)
    torch.testing.assert_close(sliced[1](x[:, KEPT]), act(x)[:, KEPT])
    assert (sliced[0].num_features, sliced[1].num_parameters, sliced[2].num_parameters) == (3, 3, 1)


def test_the_memory_format_of_weights_stays():
    conv = nn.Conv2d(8, 12, 3).to(memory_format=torch.channels_last)
    for kept_out, kept_in in (([1, 3], None), (None, [0, 2, 5]), ([1, 3], [0, 2, 5])):
        weight = slice_conv(conv, kept_out, kept_in).weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
