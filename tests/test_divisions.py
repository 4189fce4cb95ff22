import operator

import pytest
import torch
from torch import nn

from ghostify import trace
from ghostify.pruning.divisions import part_sizes, resize_parts


class Divides(nn.Module):
    """A convolution of 7 channels, and a function of its maps."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 7, 1), function

    def forward(self, x):
        return self.function(self.conv(x))


def node_after_conv(function):
    module = trace(Divides(function).eval()).module
    return module, next(iter(next(n for n in module.graph.nodes if n.op == "call_module").users))


@pytest.mark.parametrize(
    ("function", "sizes", "others"),
    [
        (lambda x: x.chunk(2, 1)[0], (4, 3), (2, 1)),
        (lambda x: torch.chunk(x, chunks=3, dim=1)[2], (3, 3, 1), (1, 3, 2)),
        (lambda x: x.split(4, dim=1)[1], (4, 3), (3, 3)),
        (lambda x: torch.split(x, [2, 5], -3)[1], (2, 5), (1, 4)),
        (lambda x: x[:, 2:], (2, 5, 0), (1, 3, 0)),
        (lambda x: x[:, -3:-1, :, :], (4, 2, 1), (2, 1, 1)),
    ],
)
def test_the_parts_of_a_node_and_the_same_node_with_other_sizes(function, sizes, others):
    module, node = node_after_conv(function)
    assert part_sizes(node, 7, 4) == sizes
    maps = torch.rand(1, sum(others), 2, 2)
    index = next((user.args[1] for user in node.users if user.target is operator.getitem), 1)
    module.conv = nn.Identity()
    resize_parts(node, others)
    module.recompile()
    assert torch.equal(module(maps), maps.split(list(others), 1)[index])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.chunk(2)[0],
        lambda x: x.split(2, -1)[0],
        lambda x: x[:2],
        lambda x: x[:, :, 1:],
        lambda x: x[:, ::2],
        lambda x: x[:, 3],
        lambda x: x[..., 1:],
    ],
)
def test_other_nodes_divide_no_channels(function):
    assert part_sizes(node_after_conv(function)[1], 7, 4) is None
