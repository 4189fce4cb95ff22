"""How channels are laid out in a tensor, and what reshapes it channel by channel."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from ghostify.graph.ops import argument, op_of
from ghostify.graph.program import called_module

Shape = tuple[int, ...]
ONE_POSITION = (1, (1, 1), [1, 1])
MAPS = 4
RESHAPES = ("view", "reshape")


@dataclass(frozen=True)
class ChannelLayout:
    """Of `rank` 4: N x C x H x W, of one position each where `pooled`; of rank 3 the same without its last dimension.

    Of rank 2: N x features, `width` of them a channel (None: not known).
    """

    rank: int = 4
    width: int | None = 1
    pooled: bool = False


def reshaped(
    module: nn.Module, node: fx.Node, layout: ChannelLayout, shapes: Mapping[str, Shape] | None = None
) -> ChannelLayout | None:
    """The layout that a node makes of that of its input where it moves dimensions only, each channel staying together;
    None for any other node."""
    if layout.rank == MAPS and _pools_all(module, node) and not argument(node, 2, "keepdim", False):
        return ChannelLayout(2)
    if layout.rank == MAPS and _flattens(module, node, shapes or {}):
        return ChannelLayout(2, 1 if layout.pooled else None)
    if layout.rank == 2 and _is_flatten(module, node):
        return layout
    if layout.rank == 2 and layout.width == 1 and _adds_positions(node):
        return ChannelLayout(pooled=True)
    if layout.pooled:
        return _squeezed(node, layout)
    return None


def resampled(module: nn.Module, node: fx.Node, layout: ChannelLayout) -> ChannelLayout | None:
    """The layout that a node which keeps channels apart makes of that of its input; None where it needs maps."""
    op = op_of(module, node)
    if op is None or op.pointwise or op.identity_in_eval or op.channel_parameters:
        return layout
    return ChannelLayout(pooled=_leaves_one_position(module, node)) if layout.rank == MAPS else None


def _leaves_one_position(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node pools every map to one position, and keeps the dimensions."""
    op = op_of(module, node)
    if op is None or not op.name.startswith("adaptive"):
        return _pools_all(module, node)
    inner: Any = called_module(module, node) if node.op == "call_module" else None
    size: Any = argument(node, 1, "output_size") if inner is None else inner.output_size
    return size in ONE_POSITION


def _pools_all(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node reduces over all positions."""
    op = op_of(module, node)
    return op is not None and op.name in ("spatial_mean", "spatial_max")


def names_channel_count(node: fx.Node) -> bool:
    """Whether a node that reshapes has the number of channels, or features, as a constant."""
    sizes = _sizes(node) if _name(node) in RESHAPES else ()
    return len(sizes) > 1 and isinstance(sizes[1], int) and sizes[1] != -1


def reads_channel_count(node: fx.Node, layout: ChannelLayout) -> bool:
    """Whether a node that reads a tensor's metadata may read its number of channels."""
    if node.op == "call_method" and node.target == "size" and len(node.args) > 1:
        return not _is_beside_channels(node.args[1], layout)
    return _is_shape(node) and not all(
        user.target is operator.getitem and (_is_beside_channels(user.args[1], layout) or not user.users)
        for user in node.users
    )


def _is_beside_channels(index: Any, layout: ChannelLayout) -> bool:
    """Whether an index into a shape leaves the channels out."""
    if isinstance(index, slice):
        return 1 not in range(layout.rank)[index]
    return isinstance(index, int) and index not in (1, 1 - layout.rank)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """The sizes that a `view` or `reshape` makes."""
    given = node.args[1:] or tuple(node.kwargs.values())
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else given


def _flattens(module: nn.Module, node: fx.Node, shapes: Mapping[str, Shape]) -> bool:
    """Whether a node makes rows of maps, one channel after another."""
    before, after = shapes.get(node.all_input_nodes[0].name), shapes.get(node.name)
    if node.op != "call_module" and _name(node) in (*RESHAPES, "flatten") and before is not None and after is not None:
        return after == (before[0], math.prod(before[1:]))
    if node.op != "call_module" and _name(node) in RESHAPES:
        sizes = _sizes(node)
        return len(sizes) == 2 and isinstance(sizes[0], fx.Node) and _reads_batch(sizes[0]) and sizes[1] == -1
    return _is_flatten(module, node)


def _is_flatten(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node flattens all dimensions but the first."""
    if node.op == "call_module":
        inner = called_module(module, node)
        return isinstance(inner, nn.Flatten) and inner.start_dim == 1 and inner.end_dim in (-1, 3)
    dims = (*node.args[1:], *node.kwargs.values())
    return _name(node) == "flatten" and dims in ((1,), (1, -1), (1, 3))


def _reads_batch(node: fx.Node) -> bool:
    """Whether a node reads the number of images of a tensor."""
    if node.op == "call_method":
        return node.target == "size" and node.args[1:] == (0,)
    source = node.args[0] if node.args else None
    return node.target is operator.getitem and _is_shape(source) and node.args[1:] == (0,)


def _is_shape(value: Any) -> bool:
    """Whether a node is a tensor's whole shape."""
    if not isinstance(value, fx.Node):
        return False
    return (value.target is getattr and value.args[1:] == ("shape",)) or (
        value.target == "size" and len(value.args) == 1
    )


def _adds_positions(node: fx.Node) -> bool:
    """Whether a node makes maps of one position of rows."""
    if node.target is operator.getitem:
        index = node.args[1]
        return index == (slice(None), slice(None), None, None)
    sizes = _sizes(node) if node.op == "call_method" and _name(node) in RESHAPES else ()
    return sizes[2:] == (1, 1) and isinstance(sizes[0], fx.Node) and _reads_batch(sizes[0])


def _squeezed(node: fx.Node, layout: ChannelLayout) -> ChannelLayout | None:
    """The layout without one of the dimensions of a single position."""
    if node.target is operator.getitem:
        index = node.args[1]
        return ChannelLayout(2) if index == (slice(None), slice(None), 0, 0) and layout.rank == MAPS else None
    if node.target not in ("squeeze", torch.squeeze) or len(node.args) != 2 or not isinstance(node.args[1], int):
        return None
    if node.args[1] not in (*range(2, layout.rank), *range(-layout.rank + 2, 0)):
        return None
    return replace(layout, rank=layout.rank - 1, pooled=layout.rank == MAPS)
