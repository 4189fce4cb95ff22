import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ghostify import trace
from ghostify.fitting.bn_statistics import ChannelStats, activation_stats, input_channel_stats
from tests import nets


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.2)])
def test_activations_of_normal_values(activation):
    mean, deviation = torch.tensor([-2.0, 0.0, 1.5]).double(), torch.tensor([1.0, 0.5, 2.0]).double()
    values = activation(mean + deviation * torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)))
    stats = activation_stats(activation, ChannelStats(mean, deviation.square()))
    torch.testing.assert_close(stats.mean, values.mean(0), atol=0.02, rtol=0.02)
    torch.testing.assert_close(stats.var, values.var(0), atol=0.03, rtol=0.03)


class Paths(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(1)
        self.added, self.concatenated, self.raw = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        a, b = self.a(x), self.b(x)
        joined = torch.cat((a, self.pool(b)), 1)
        return self.added(F.dropout(a, training=self.training) + b) + self.concatenated(joined) + self.raw(x * 2)


def test_statistics_of_sums_and_concatenations_of_norms():
    model = nets.settle(Paths())
    module = trace(model).module
    a, b = [(n.weight.detach().double().square(), n.bias.detach().double()) for n in (model.a, model.b)]
    stats = input_channel_stats(module)["added"]
    torch.testing.assert_close(stats.var, a[0] + b[0])
    torch.testing.assert_close(stats.mean, a[1] + b[1])
    torch.testing.assert_close(input_channel_stats(module)["concatenated"].var, torch.cat((a[0], b[0])))


def test_unknown_statistics_are_left_out():
    module = trace(nets.settle(Paths())).module
    assert not {"raw", "stem"} & set(input_channel_stats(module))


class Spelled(nn.Module):
    """The same operations as modules and as functions."""

    def __init__(self):
        super().__init__()
        self.norm, self.pool, self.up, self.act = nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.Upsample(None, 2), nn.ELU(0.5)
        self.modules_conv, self.functions_conv = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = self.norm(x)
        modules = self.act(self.up(self.pool(x)))
        functions = F.elu(F.interpolate(F.avg_pool2d(x, 2), None, 2), 0.5)
        by_modules, by_functions = torch.cat((modules, modules), 1), torch.cat((functions, functions), dim=-3)
        return self.modules_conv(by_modules) + self.functions_conv(by_functions)


def test_functions_give_the_same_statistics_as_modules():
    stats = input_channel_stats(trace(nets.settle(Spelled())).module)
    assert torch.equal(stats["modules_conv"].var, stats["functions_conv"].var)
    assert torch.equal(stats["modules_conv"].mean, stats["functions_conv"].mean)
