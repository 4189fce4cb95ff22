import pytest
import timm
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small

from ghostify import trace
from ghostify.planning.links import links_of
from tests import nets


def names(model):
    return [tuple(m.conv.name for m in link.line) for link in links_of(trace(model.eval()))]


def test_an_inverted_residual_is_one_link_with_its_norms():
    program = trace(nets.Inverted().eval())
    (link,) = links_of(program)
    assert [m.conv.name for m in link.line] == ["expand.0", "depthwise.0", "project.0"]
    assert [m.norms for m in link.line] == [("expand.1",), ("depthwise.1",), ()]
    assert [(m.makes, m.reads) for m in link.line] == [(True, False), (True, True), (False, True)]
    assert link.maps == 48


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (nets.Straight, [("stem.0", "a.0"), ("a.0", "b.0")]),
        (nets.Residual, [("conv1", "conv2")]),
        (nets.Functional, []),
        (nets.Shared, []),
    ],
)
def test_links_end_where_others_read_the_maps(make, found):
    assert names(make()) == found


def test_every_block_of_mobilenet_is_a_link():
    model = timm.create_model("mobilenetv2_050")
    blocks = [m for m in model.modules() if type(m).__name__ == "InvertedResidual"]
    assert sum(len(own) == 3 for own in names(model)) == len(blocks) + 1  # the stem leads into the first


@pytest.mark.parametrize("between", [nn.GroupNorm(2, 8), nn.PReLU(8), nn.LayerNorm(6), nn.PixelShuffle(1)])
def test_what_mixes_maps_or_knows_their_number_ends_a_link(between):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.Conv2d(8, 4, 1))
    assert names(model) == []


def test_hooks_and_maps_that_are_grouped_otherwise_end_a_link():
    grouped = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 4, 1))
    assert names(grouped) == []
    hooked = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    assert len(names(hooked)) == 1
    hooked[1].register_forward_hook(lambda *_: None)
    assert names(hooked) == []


def test_hooks_on_what_lies_between_end_a_link():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    assert len(names(model)) == 1
    model[1].register_forward_hook(lambda *_: None)
    assert names(model) == []


class Gated(nn.Module):
    def __init__(self, gate=8, returned=False):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.reduce, self.expand, self.returned = nn.Conv2d(8, 4, 1), nn.Conv2d(4, gate, 1), returned

    def forward(self, x):
        x = self.a(x)
        scale = self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu())
        return (self.b(x * scale.sigmoid()), *([scale] if self.returned else []))


def test_a_gate_that_others_read_or_that_is_one_for_all_maps_ends_a_link():
    assert ("a", "b") in names(Gated())
    assert ("a", "b") not in names(Gated(returned=True))
    assert ("a", "b") not in names(Gated(gate=1))


def test_shapes_are_not_needed():
    program = trace(nets.Inverted().eval())
    assert program.macs is None
    assert len(list(links_of(program))) == 1


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_050", "mnasnet_small", "tv_mobilenet_v3_small"])
def test_squeeze_excite_is_part_of_a_link(name):
    model = mobilenet_v3_small(weights=None) if name.startswith("tv_") else timm.create_model(name)
    program = trace(model.eval())
    found = list(links_of(program))
    gated = [link for link in found if link.gates]
    excited = [m for m in model.modules() if type(m).__name__ == "SqueezeExcitation" or hasattr(m, "conv_reduce")]
    assert len(gated) == len(excited) > 0
    for link in gated:
        assert [(m.makes, m.reads) for m in link.gates] == [(False, True), (True, False)]
        assert link.gates[0].conv.inputs == link.gates[1].conv.outputs == link.maps


class Scaled(nn.Module):
    """Two convolutions, and between them a product that is no squeeze-excite block."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 1)
        self.scale, self.how = nn.Parameter(torch.ones(1, 8, 1, 1)), how

    def forward(self, x):
        x = self.a(x)
        return self.b(self.how(self, x))


@pytest.mark.parametrize(
    "how",
    [
        lambda self, x: x * self.scale,
        lambda self, x: x * self.c(x),
        lambda self, x: x * self.c(x.mean((2, 3), keepdim=True)).softmax(1),
        lambda self, x: x * self.c(x.mean((1, 3), keepdim=True).expand(-1, 8, -1, 1)),
    ],
)
def test_other_products_end_a_link(how):
    assert names(Scaled(how)) == []
