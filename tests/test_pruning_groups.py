import pytest
import timm
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small

from ghostify import trace
from ghostify.pruning.pruning_groups import PruningGroup, Unprunable, find_pruning_groups, kept_by_conv
from tests import nets


def groups_of(model):
    return [group for group in find_pruning_groups(trace(model.eval())) if isinstance(group, PruningGroup)]


def names(model):
    return [tuple(member.conv.name for member in group.members) for group in groups_of(model)]


def reasons(model):
    groups = find_pruning_groups(trace(model.eval()))
    return {group.name: group.reason for group in groups if isinstance(group, Unprunable)}


def test_an_inverted_residual_is_one_group_with_its_norms():
    group = next(g for g in groups_of(nets.Inverted()) if not g.channels.residual)
    assert [m.conv.name for m in group.members] == ["expand.0", "depthwise.0", "project.0"]
    assert [(m.prunes_outputs, m.prunes_inputs) for m in group.members] == [(True, False), (True, True), (False, True)]
    paths = {m.path.rpartition(".")[0] for m in group.channels.parameters if m.path != "depthwise.0"}
    assert paths == {"expand.1", "depthwise.1"}
    assert group.size == 48


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (nets.Straight, [("stem.0", "a.0"), ("a.0", "b.0"), ("b.0", "fc")]),
        (nets.Residual, [("stem.0", "conv1", "conv2", "head"), ("conv1", "conv2")]),
        (nets.Branches, [("stem.0", "left.0", "right"), ("left.0", "last.0"), ("right", "last.0")]),
        (nets.Functional, []),
        (nets.Shared, []),
    ],
)
def test_groups_of_tiny_networks(make, expected):
    assert names(make()) == expected


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (nets.Straight, "fc", "the channels reach the output"),
        (nets.Residual, "head", "the channels reach the output"),
        (nets.Functional, "stem", "the function conv2d reads the channels"),
        (nets.Shared, "stem.0", "again is called several times"),
    ],
)
def test_groups_that_cannot_be_pruned_have_a_reason(make, name, reason):
    assert reasons(make())[name] == reason


def test_every_block_of_mobilenet_is_a_group():
    model = timm.create_model("mobilenetv2_050")
    blocks = [m for m in model.modules() if type(m).__name__ == "InvertedResidual"]
    chains = [group for group in groups_of(model) if len(group.members) == 3 and not group.channels.residual]
    assert len(chains) == len(blocks) + 1  # the stem leads into the first


@pytest.mark.parametrize("between", [nn.GroupNorm(2, 8), nn.LayerNorm(6), nn.PixelShuffle(1), nn.Softmax(1)])
def test_operators_that_mix_channels_prevent_pruning(between):
    assert names(nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.Conv2d(8, 4, 1))) == []


@pytest.mark.parametrize(
    "between", [nn.PReLU(8), nn.SiLU(), nn.Hardswish(), nn.ZeroPad2d(1), nn.Upsample(scale_factor=2)]
)
def test_channelwise_operators_do_not(between):
    assert names(nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.Conv2d(8, 4, 1))) == [("0", "2")]


class Fan(nn.Module):
    """A convolution that reads the outputs of so many others."""

    def __init__(self, count):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 2, 1) for _ in range(count))
        self.last = nn.Conv2d(2 * count, 4, 1)

    def forward(self, x):
        return self.last(torch.cat([branch(x) for branch in self.branches], 1))


def test_a_convolution_that_reads_very_many_groups_prevents_pruning():
    assert len(names(Fan(8))) == 8
    assert set(reasons(Fan(9)).values()) == {
        "last reads more than 8 groups of channels",
        "the channels reach the output",
    }


def test_hooks_and_grouped_convolutions_prevent_pruning():
    grouped = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 4, 1))
    assert names(grouped) == []
    for position in (1, 2):
        hooked = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        assert len(names(hooked)) == 1
        hooked[position].register_forward_hook(lambda *_: None)
        assert names(hooked) == []


class Gated(nn.Module):
    def __init__(self, gate=8, returned=False):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.reduce, self.expand, self.returned = nn.Conv2d(8, 4, 1), nn.Conv2d(4, gate, 1), returned

    def forward(self, x):
        x = self.a(x)
        scale = self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu())
        return (self.b(x * scale.sigmoid()), *([scale] if self.returned else []))


def test_a_gate_that_is_returned_or_common_to_all_channels_prevents_pruning():
    assert ("a", "b", "reduce", "expand") in names(Gated())
    assert names(Gated(returned=True)) == [("reduce", "expand")]
    assert names(Gated(gate=1)) == [("reduce", "expand")]


def test_shapes_are_not_needed():
    program = trace(nets.Inverted().eval())
    assert program.macs is None
    assert len([g for g in find_pruning_groups(program) if isinstance(g, PruningGroup)]) == 2


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_050", "mnasnet_small", "tv_mobilenet_v3_small"])
def test_squeeze_excite_is_part_of_a_group(name):
    model = mobilenet_v3_small(weights=None) if name.startswith("tv_") else timm.create_model(name)
    gated = [group for group in groups_of(model) if any(member.gate for member in group.members)]
    blocks = [m for m in model.modules() if type(m).__name__ == "SqueezeExcitation" or hasattr(m, "conv_reduce")]
    assert len(gated) == len(blocks) > 0
    for group in gated:
        reduce, expand = (member for member in group.members if member.gate)
        assert [(m.prunes_outputs, m.prunes_inputs) for m in (reduce, expand)] == [(False, True), (True, False)]
        assert reduce.conv.inputs == expand.conv.outputs == group.size
        assert len(group.refitted) == 1


def test_the_kept_channels_of_each_convolution():
    program = trace(nets.Residual().eval())
    stream, inner = (g for g in find_pruning_groups(program) if isinstance(g, PruningGroup))
    kept = kept_by_conv(program, {stream: (0, 2), inner: (1, 3, 4)})
    assert {name: (channels.kept_out, channels.kept_in) for name, channels in kept.items()} == {
        "stem.0": ((0, 2), None),
        "conv1": ((1, 3, 4), (0, 2)),
        "conv2": ((0, 2), (1, 3, 4)),
        "head": (None, (0, 2)),
    }
    tensors = dict(pair for channels in kept.values() for pair in channels.tensors)
    assert tensors["stem.1.weight"] == tensors["bn2.running_var"] == (0, 2)
    assert tensors["bn1.bias"] == (1, 3, 4)
    assert torch.equal(torch.tensor([len(entries) for entries in tensors.values()]).unique(), torch.tensor([2, 3]))
