import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, DropPath
from torch import nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation, StochasticDepth

from ghostify import trace
from ghostify.pruning.channel_groups import find_channel_groups
from ghostify.pruning.kept_channels import kept_by_path, kept_parts, prune_channels, resize_divisions
from ghostify.pruning.permutation import permute_group
from tests import nets
from tests.test_apply import random_network


class Between(nn.Module):
    """A convolution `a` of 6 channels, the function `between`, and a last convolution `z` of `inputs` channels."""

    def __init__(self, between, inputs=6, **modules):
        super().__init__()
        self.between, self.a, self.z = between, nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(inputs, 4, 1)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.z(self.between(self, self.a(x)))


def between(function, inputs=6, **modules):
    return lambda: Between(function, inputs, **modules)


class LinearSqueezeExcite(nn.Module):
    """Squeeze-excite with linear layers."""

    def __init__(self):
        super().__init__()
        self.reduce, self.expand = nn.Linear(6, 2), nn.Linear(2, 6)

    def forward(self, x):
        scale = self.expand(self.reduce(x.mean((2, 3))).relu()).sigmoid()
        return x * scale.view(x.size(0), -1, 1, 1)


class FlattenedHead(nn.Module):
    """A classifier of flattened maps."""

    def __init__(self, flatten):
        super().__init__()
        self.a, self.pool, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Linear(24, 5)
        self.flatten, self.last = flatten, nn.Linear(5, 3)

    def forward(self, x):
        return self.last(F.relu(self.fc(self.flatten(self.pool(F.relu(self.a(x)))))))


class PooledHead(FlattenedHead):
    """A classifier of pooled maps."""

    def __init__(self, flatten):
        super().__init__(flatten)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.last(self.fc(self.flatten(self.a(x))))


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


CHANNELWISE = {
    "norm": between(lambda m, x: F.relu(m.n(x)), n=nn.BatchNorm2d(6)),
    "norm with activation": between(lambda m, x: m.n(x), n=BatchNormAct2d(6)),
    "PReLU": between(lambda m, x: m.p(x), p=nn.PReLU(6)),
    "PReLU of one value": between(lambda m, x: m.p(x), p=nn.PReLU()),
    "prelu": between(lambda m, x: F.prelu(x, m.w), w=nn.Parameter(torch.rand(6))),
    "x sigmoid x": between(lambda _, x: x * torch.sigmoid(x)),
    "hardswish": between(lambda _, x: F.hardswish(x)),
    "hardswish in steps": between(lambda _, x: x * (F.relu6(x + 3) / 6)),
    "pad": between(lambda _, x: F.pad(x, (1, 2, 0, 1))),
    "pool": between(lambda m, x: F.avg_pool2d(m.p(x), 2), p=nn.MaxPool2d(2)),
    "interpolate": between(lambda _, x: F.interpolate(x, size=x.shape[-2:])),
    "drop": between(
        lambda m, x: m.s(m.p(F.dropout(x, 0.5, m.training))), p=DropPath(0.5), s=StochasticDepth(0.5, "row")
    ),
    "depthwise": between(lambda m, x: m.d(x), d=conv(6, 6, groups=6)),
    "squeeze-excite": between(lambda m, x: m.s(x), s=SqueezeExcitation(6, 2)),
    "squeeze-excite, hard": between(lambda m, x: m.s(x), s=SqueezeExcitation(6, 2, scale_activation=nn.Hardsigmoid)),
    "squeeze-excite, linear": between(lambda m, x: m.s(x), s=LinearSqueezeExcite()),
    "residual": between(lambda m, x: F.relu(x + m.b(x)), b=conv(6, 6)),
    "residual in place": between(lambda m, x: x.add_(m.b(x)), b=conv(6, 6)),
    "two consumers": between(lambda m, x: torch.cat((m.b(x), m.c(x)), 1), 9, b=conv(6, 5), c=conv(6, 4)),
    "concatenation": between(lambda m, x: m.n(torch.cat((x, m.b(x)), 1)), 11, b=conv(6, 5), n=nn.BatchNorm2d(11)),
    "concatenation of itself": between(lambda _, x: torch.cat((x, x), 1), 12),
    "concatenation plus whole": between(
        lambda m, x: torch.cat((x, m.b(x)), 1) + m.c(x), 11, b=conv(6, 5), c=conv(6, 11)
    ),
    "chunk": between(lambda m, x: torch.cat((x.chunk(2, 1)[0], m.b(x.chunk(2, 1)[1])), 1), 7, b=conv(3, 4)),
    "split": between(lambda m, x: m.b(torch.split(x, [4, 2], dim=1)[0]), 5, b=conv(4, 5)),
    "split in equal parts": between(lambda m, x: torch.cat((x, m.b(x.split(4, -3)[1])), 1), 9, b=conv(2, 3)),
    "slices": between(lambda m, x: torch.cat((x[:, :4] + m.b(x), x[:, 4:]), 1), b=conv(6, 4)),
    "slice before the last": between(lambda _, x: x[:, 1:-1, :], 4),
    "flatten": lambda: FlattenedHead(lambda x: torch.flatten(x, 1)),
    "flatten module": lambda: FlattenedHead(nn.Flatten()),
    "view": lambda: FlattenedHead(lambda x: x.view(x.shape[0], -1)),
    "pool and flatten": lambda: PooledHead(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)),
    "mean": lambda: PooledHead(lambda x: x.mean((2, 3))),
    "pool and squeeze": lambda: PooledHead(lambda x: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1)),
    "pool and index": lambda: PooledHead(lambda x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0]),
}


def groups_of(model):
    program = trace(model.eval())
    return program.module, find_channel_groups(program.module).groups


def permuted(module, groups, seed=0):
    generator, permuted_copy = torch.Generator().manual_seed(seed), copy.deepcopy(module)
    for group in groups:
        if group.permuting_obstacle is None:
            permute_group(permuted_copy, group, torch.randperm(group.size, generator=generator))
    return permuted_copy


def assert_permutable(model, seed=0):
    module, groups = groups_of(nets.settle(model).double())
    x = nets.images(2, 8).double()
    torch.testing.assert_close(permuted(module, groups, seed)(x), module(x))
    return groups


def assert_prunable(model, seed=0):
    """Pruning channels is the same as multiplying them by zero where they are read."""
    module = trace(nets.settle(model).double().eval()).module
    channel_groups = find_channel_groups(module)
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in channel_groups.groups:
        if group.pruning_obstacle is None and group.size > 1:
            count = int(torch.randint(1, group.size, (), generator=generator))
            kept[group] = torch.randperm(group.size, generator=generator)[:count].sort().values.tolist()
    zeroed, pruned, x = copy.deepcopy(module), copy.deepcopy(module), nets.images(2, 8).double()
    for group, kept_channels in kept.items():
        removed = [k for k in range(group.size) if k not in kept_channels]
        for member in group.consumers:
            weight = zeroed.get_submodule(member.path).weight.data
            weight.unflatten(1, (-1, member.width))[:, [member.start + k for k in removed]] = 0
    prune_channels(pruned, kept_by_path(module, kept))
    resize_divisions(pruned, kept_parts(channel_groups, kept))
    pruned.recompile()
    torch.testing.assert_close(pruned(x), zeroed(x))
    return kept


@pytest.mark.parametrize("name", CHANNELWISE)
def test_groups_can_be_pruned(name):
    assert assert_prunable(CHANNELWISE[name]())


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_group_without_obstacle_in_a_random_network_can_be_pruned(seed):
    assert_prunable(random_network(seed), seed)


@pytest.mark.parametrize("name", CHANNELWISE)
def test_channelwise_operators_are_no_obstacle(name):
    groups = assert_permutable(CHANNELWISE[name]())
    (group,) = [g for g in groups if any(m.path == "a" for m in g.producers)][:1]
    assert group.permuting_obstacle is None
    assert group.pruning_obstacle is None


@pytest.mark.parametrize(
    ("function", "modules", "reason"),
    [
        (lambda _, x: x.flip(1), {}, "flip may mix channels"),
        (lambda _, x: F.pad(x, (0, 0, 0, 0, 1, -1)), {}, "pad may mix channels"),
        (lambda m, x: m.n(x), {"n": nn.GroupNorm(2, 6)}, "n may mix channels"),
        (lambda m, x: m.g(x), {"g": conv(6, 6, groups=3)}, "g convolves in groups"),
        (lambda m, x: m.g(x), {"g": conv(6, 6)}, None),
        (lambda m, x: m.g(m.g(x)), {"g": conv(6, 6)}, "g is called several times"),
        (lambda m, x: m.n(m.n(x)), {"n": nn.BatchNorm2d(6)}, "n is called several times"),
        (lambda m, x: x * m.s, {"s": nn.Parameter(torch.rand(1, 6, 1, 1))}, "mul may mix channels"),
        (lambda m, x: x * m.g(x), {"g": conv(6, 1)}, "mul may mix channels"),
        (lambda _, x: x * x.mean(1, keepdim=True), {}, "mean may mix channels"),
        (
            lambda m, x: F.conv2d(x, m.w),
            {"w": nn.Parameter(torch.rand(6, 6, 1, 1))},
            "the function conv2d reads the channels",
        ),
        (lambda _, x: torch.cat((x, x), 2), {}, "cat may mix channels"),
    ],
)  # fmt: skip
def test_operators_that_mix_channels_are_obstacles(function, modules, reason):
    groups = assert_permutable(Between(function, **modules))
    assert groups[0].order_obstacle == reason


def test_channels_of_the_output_cannot_change():
    groups = assert_permutable(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)))
    assert [g.order_obstacle for g in groups] == [None, "the channels reach the output"]


def test_hooks_are_obstacles():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[1].register_forward_hook(lambda *_: None)
    assert groups_of(model)[1][0].order_obstacle == "1 has hooks"


def test_shared_weights_are_obstacles():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    model[2].weight = model[1].weight
    reasons = [g.order_obstacle for g in groups_of(model)[1]]
    assert reasons[:3] == ["1 shares its weights"] * 2 + ["2 shares its weights"]


def test_boundaries_of_methods_are_obstacles():
    groups = assert_permutable(nets.Methods())
    reason = "the method forward_features starts or ends at them"
    assert [g.order_obstacle for g in groups][:3] == [None, None, reason]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda _, x: F.interpolate(x, scale_factor=x.size(1) / 6), "the number of channels is read"),
        (lambda _, x: F.interpolate(x, scale_factor=x.shape[1] / 6), "the number of channels is read"),
        (lambda _, x: F.interpolate(x, size=(x.size(2), x.size(-1))), None),
        (lambda _, x: F.interpolate(x, size=x.shape[2:]), None),
    ],
)
def test_reading_the_number_of_channels_is_an_obstacle_to_pruning(function, reason):
    groups = groups_of(Between(function))[1]
    assert groups[0].order_obstacle is None
    assert groups[0].pruning_obstacle == reason


def test_reshaping_features_to_maps_is_an_obstacle():
    groups = groups_of(FlattenedHead(lambda x: x.view(x.size(0), -1, 1, 1).view(x.size(0), -1)))[1]
    assert groups[0].order_obstacle is not None


def test_the_members_of_a_residual_stream():
    _, (stream, inner, head) = groups_of(nets.Residual())
    assert [m.path for m in stream.producers] == ["stem.0", "conv2"]
    assert [m.path for m in stream.consumers] == ["conv1", "head"]
    assert {m.path.rpartition(".")[0] for m in stream.parameters} == {"stem.1", "bn2"}
    assert stream.residual
    assert not inner.residual
    assert [m.path for m in inner.producers + inner.consumers] == ["conv1", "conv2"]
    assert head.order_obstacle == "the channels reach the output"


def test_each_group_has_its_position_in_a_concatenation():
    _, groups = groups_of(nets.Branches())
    left, right = (next(g for g in groups if g.producers[0].path == path) for path in ("left.0", "right"))
    assert [(m.path, m.start, m.count) for m in left.consumers] == [("last.0", 0, 8)]
    assert [(m.path, m.start, m.count) for m in right.consumers] == [("last.0", 8, 12)]


def test_a_sum_with_a_concatenation_splits_the_producer():
    _, groups = groups_of(CHANNELWISE["concatenation plus whole"]())
    assert [[(m.path, m.start, m.count) for m in g.producers] for g in groups[:2]] == [
        [("a", 0, 6), ("c", 0, 6)],
        [("b", 0, 5), ("c", 6, 5)],
    ]


def test_each_channel_of_flattened_maps_is_several_features():
    _, groups = groups_of(CHANNELWISE["flatten"]())
    assert [(m.path, m.width) for m in groups[0].consumers] == [("fc", 4)]


def test_squeeze_excite_blocks_are_gates():
    _, groups = groups_of(nets.Inverted(squeeze=True))
    (group,) = [g for g in groups if g.producers[0].path == "expand.0"]
    assert [(m.path, m.gate) for m in group.producers] == [("expand.0", False), ("squeeze.fc2", True)]
    assert [(m.path, m.gate) for m in group.consumers] == [("squeeze.fc1", True), ("project.0", False)]


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_group_without_obstacle_in_a_random_network_can_be_permuted(seed):
    assert_permutable(random_network(seed), seed)
