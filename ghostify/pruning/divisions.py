"""Nodes that divide a tensor along its channels: the sizes of the parts, and the same node with other sizes."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from ghostify.graph.op_queries import target_name
from ghostify.graph.ops import argument

WHOLE = slice(None)
CHANNELS_DIM = 1


def part_sizes(node: fx.Node, channels: int, rank: int) -> tuple[int, ...] | None:
    """The sizes of the parts that a node divides its input of so many channels into: for a slice those before, in and
    after it. None for any other node."""
    if (channel_slice := _channel_slice(node)) is not None:
        first, last, _ = channel_slice.indices(channels)
        return first, max(last - first, 0), channels - max(first, last)
    name, count = target_name(node), argument(node, 1, _count_name(node))
    is_split = node.op in ("call_function", "call_method") and name in ("chunk", "split")
    dim = argument(node, 2, "dim", 0)
    if not is_split or dim not in (CHANNELS_DIM, CHANNELS_DIM - rank):
        return None
    if isinstance(count, int) and count > 0:
        size = math.ceil(channels / count) if name == "chunk" else count
        return tuple(min(size, channels - start) for start in range(0, channels, size))
    are_sizes = isinstance(count, list | tuple) and all(isinstance(size, int) for size in count)
    return tuple(count) if are_sizes and sum(count) == channels else None


def is_channel_slice(node: fx.Node) -> bool:
    """Whether a node is a slice of a tensor's channels, not a division into several parts."""
    return _channel_slice(node) is not None


def resize_parts(node: fx.Node, sizes: tuple[int, ...]) -> None:
    """Change the sizes of a node's parts, in place; see `part_sizes`."""
    source = node.args[0] if node.args else node.all_input_nodes[0]
    if is_channel_slice(node):
        index: Any = node.args[1]
        node.args = source, (WHOLE, slice(sizes[0], sizes[0] + sizes[1]), *index[2:])
        return
    dim = argument(node, 2, "dim", 0)
    node.target = "split" if node.op == "call_method" else torch.split
    node.args, node.kwargs = (source, list(sizes), dim), {}


def _count_name(node: fx.Node) -> str:
    if target_name(node) == "chunk":
        return "chunks"
    return "split_size" if node.op == "call_method" else "split_size_or_sections"


def _channel_slice(node: fx.Node) -> slice | None:
    """The range of channels that an index selects, with all of the other dimensions."""
    index: Any = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, tuple) or len(index) < 2 or any(i != WHOLE for i in (index[0], *index[2:])):
        return None
    selected = index[1]
    if not isinstance(selected, slice) or selected == WHOLE or selected.step not in (None, 1):
        return None
    return selected if all(isinstance(b, int | None) for b in (selected.start, selected.stop)) else None
