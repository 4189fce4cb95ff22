import pytest
import torch
from torch.nn import functional as F

from ghostify.fitting.data_free import white_input_statistics


@pytest.mark.parametrize(
    ("stride", "dilation"),
    [((1, 1), (1, 1)), ((2, 1), (1, 1)), ((1, 1), (2, 2)), ((2, 2), (2, 1)), ((2, 3), (3, 2)), ((1, 1), (3, 1))],
)
def test_moments_under_white_inputs_are_those_of_noise(stride, dilation):
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    stats = white_input_statistics(weight, 3, stride=stride, dilation=dilation)
    maps = F.conv2d(torch.randn(1, 3, 900, 900), weight, stride=stride, dilation=dilation)
    shifts = F.unfold(maps, 3).reshape(4, 9, -1).double()
    measured = torch.einsum("idp,jep->diej", shifts, shifts) / shifts.shape[-1]
    scale = stats.var.max()
    assert ((stats.gram - measured).abs().max() / scale) < 0.05
    assert torch.equal(stats.cross, stats.gram[:, :, 4])


def test_known_means_variances_and_input_variances_are_used():
    weight = torch.randn(4, 3, 3, 3)
    mean, variance = torch.randn(4), torch.rand(4) + 0.1
    stats = white_input_statistics(weight, 3, mean=mean, variance=variance)
    torch.testing.assert_close(stats.var, variance.double())
    torch.testing.assert_close(stats.mean_y, mean.double())
    single_input = white_input_statistics(weight, 1, input_variance=torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(single_input.var, weight[:, 0].double().square().sum((1, 2)))


def test_map_by_map_is_the_diagonal_of_the_full_statistics():
    weight = torch.randn(5, 3, 3, 3)
    full, maps = white_input_statistics(weight, 3), white_input_statistics(weight, 3, map_by_map=True)
    torch.testing.assert_close(maps.auto, torch.stack([full.gram[:, i, :, i] for i in range(5)]))
    torch.testing.assert_close(maps.cross, full.cross)
