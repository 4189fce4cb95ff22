"""The dimensions in which a tensor holds channels, and the operators that reshape it channel by channel."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from ghostify.graph.op_queries import target_name
from ghostify.graph.ops import argument, op_of
from ghostify.graph.paths import called_module
from ghostify.graph.program import Shape

ONE_POSITION = (1, (1, 1), [1, 1])
MAPS_RANK = 4
RESHAPES = ("view", "reshape")


@dataclass(frozen=True)
class ChannelLayout:
    """The layout of a tensor of `rank` 4: N x C x H x W, with H = W = 1 if `pooled`; of rank 3: N x C x 1.

    Of rank 2: N x features, `width` features per channel (None: unknown).
    """

    rank: int = 4
    width: int | None = 1
    pooled: bool = False


def layout_after_reshape(
    module: nn.Module, node: fx.Node, layout: ChannelLayout, shapes: Mapping[str, Shape] | None = None
) -> ChannelLayout | None:
    """The layout of a node's output, from the layout of its input, if the node only adds, removes or flattens
    dimensions and keeps each channel's values together; None otherwise."""
    if layout.rank == MAPS_RANK and _pools_all(module, node) and not argument(node, 2, "keepdim", False):
        return ChannelLayout(2)
    if layout.rank == MAPS_RANK and _flattens(module, node, shapes or {}):
        return ChannelLayout(2, 1 if layout.pooled else None)
    if layout.rank == 2 and _is_flatten(module, node):
        return layout
    if layout.rank == 2 and layout.width == 1 and _adds_positions(node):
        return ChannelLayout(pooled=True)
    if layout.pooled:
        return _layout_after_squeeze(node, layout)
    return None


def layout_after_resampling(module: nn.Module, node: fx.Node, layout: ChannelLayout) -> ChannelLayout | None:
    """The layout of a channelwise node's output, from that of its input; None where the node needs N x C x H x W."""
    op = op_of(module, node)
    if op is None or op.pointwise or op.identity_in_eval or op.channel_parameters:
        return layout
    return ChannelLayout(pooled=_pools_to_one_position(module, node)) if layout.rank == MAPS_RANK else None


def _pools_to_one_position(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node pools every map to one position, and keeps the rank."""
    op = op_of(module, node)
    if op is None or not op.name.startswith("adaptive"):
        return _pools_all(module, node)
    pool: Any = called_module(module, node) if node.op == "call_module" else None
    size: Any = argument(node, 1, "output_size") if pool is None else pool.output_size
    return size in ONE_POSITION


def _pools_all(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node reduces over all positions."""
    op = op_of(module, node)
    return op is not None and op.name in ("spatial_mean", "spatial_max")


def has_constant_channel_count(node: fx.Node) -> bool:
    """Whether a node that reshapes has the number of channels, or features, as a constant argument."""
    sizes = _sizes(node) if target_name(node) in RESHAPES else ()
    return len(sizes) > 1 and isinstance(sizes[1], int) and sizes[1] != -1


def reads_channel_count(node: fx.Node, layout: ChannelLayout) -> bool:
    """Whether a node that reads the metadata of a tensor with this layout may read its number of channels."""
    if node.op == "call_method" and node.target == "size" and len(node.args) > 1:
        return not _excludes_channels(node.args[1], layout)
    return _is_shape(node) and not all(
        user.target is operator.getitem and (_excludes_channels(user.args[1], layout) or not user.users)
        for user in node.users
    )


def _excludes_channels(index: Any, layout: ChannelLayout) -> bool:
    """Whether an index into a shape excludes the dimension of the channels."""
    if isinstance(index, slice):
        return 1 not in range(layout.rank)[index]
    return isinstance(index, int) and index not in (1, 1 - layout.rank)


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """The size arguments of a `view` or `reshape`."""
    sizes = node.args[1:] or tuple(node.kwargs.values())
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes


def _flattens(module: nn.Module, node: fx.Node, shapes: Mapping[str, Shape]) -> bool:
    """Whether a node flattens N x C x H x W to N x features, one channel after another."""
    shape_in, shape_out = shapes.get(node.all_input_nodes[0].name), shapes.get(node.name)
    is_reshape = node.op != "call_module" and target_name(node) in (*RESHAPES, "flatten")
    if is_reshape and shape_in is not None and shape_out is not None:
        return shape_out == (shape_in[0], math.prod(shape_in[1:]))
    if node.op != "call_module" and target_name(node) in RESHAPES:
        sizes = _sizes(node)
        return len(sizes) == 2 and isinstance(sizes[0], fx.Node) and _reads_batch(sizes[0]) and sizes[1] == -1
    return _is_flatten(module, node)


def _is_flatten(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node flattens all dimensions but the first."""
    if node.op == "call_module":
        flatten = called_module(module, node)
        return isinstance(flatten, nn.Flatten) and flatten.start_dim == 1 and flatten.end_dim in (-1, 3)
    dims = (*node.args[1:], *node.kwargs.values())
    return target_name(node) == "flatten" and dims in ((1,), (1, -1), (1, 3))


def _reads_batch(node: fx.Node) -> bool:
    """Whether a node reads the batch size of a tensor."""
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
    """Whether a node reshapes N x features to N x features x 1 x 1."""
    if node.target is operator.getitem:
        index = node.args[1]
        return index == (slice(None), slice(None), None, None)
    sizes = _sizes(node) if node.op == "call_method" and target_name(node) in RESHAPES else ()
    return sizes[2:] == (1, 1) and isinstance(sizes[0], fx.Node) and _reads_batch(sizes[0])


def _layout_after_squeeze(node: fx.Node, layout: ChannelLayout) -> ChannelLayout | None:
    """The layout after removing one or both dimensions of size 1, None where the node does something else."""
    if node.target is operator.getitem:
        index = node.args[1]
        return ChannelLayout(2) if index == (slice(None), slice(None), 0, 0) and layout.rank == MAPS_RANK else None
    if node.target not in ("squeeze", torch.squeeze) or len(node.args) != 2 or not isinstance(node.args[1], int):
        return None
    if node.args[1] not in (*range(2, layout.rank), *range(-layout.rank + 2, 0)):
        return None
    return replace(layout, rank=layout.rank - 1, pooled=layout.rank == MAPS_RANK)
