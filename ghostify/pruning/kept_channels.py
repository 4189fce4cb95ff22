"""Channels that modules and tensors keep when groups are pruned, and the pruning of a graph's module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from ghostify.graph.paths import resolve_attribute
from ghostify.pruning.channel_groups import ChannelGroup, ChannelGroups
from ghostify.pruning.divisions import resize_parts
from ghostify.pruning.slicing import slice_conv, slice_linear, slice_tensor


@dataclass(frozen=True)
class KeptChannels:
    """The indices of kept outputs, or entries of a tensor, and of kept inputs; None where all are kept.

    `tensors` are the paths of tensors that a plan prunes together with a convolution, and their kept entries; `parts`
    the names of nodes that divide pruned channels, and the new sizes of their parts (see `divisions`).
    """

    kept_out: tuple[int, ...] | None = None
    kept_in: tuple[int, ...] | None = None
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()
    parts: tuple[tuple[str, tuple[int, ...]], ...] = ()


def kept_by_path(module: nn.Module, kept: Mapping[ChannelGroup, Sequence[int]]) -> dict[str, KeptChannels]:
    """The kept channels of every member of groups that keep some of their channels, by its path in `module`.

    A member of several groups loses channels of all of them.
    """
    pruned_out, pruned_in = defaultdict[str, set[int]](set), defaultdict[str, set[int]](set)
    for group, kept_channels in kept.items():
        pruned = set(range(group.size)) - set(kept_channels)
        for member in (*group.producers, *group.parameters):
            pruned_out[member.path] |= {member.start + k for k in pruned}
        for member in group.consumers:
            width = member.width
            pruned_in[member.path] |= {(member.start + k) * width + j for k in pruned for j in range(width)}
    paths = dict.fromkeys((*pruned_out, *pruned_in))
    sizes = {path: _sizes(resolve_attribute(module, path)) for path in paths}
    return {
        path: KeptChannels(_without(outputs, pruned_out.get(path)), _without(inputs, pruned_in.get(path)))
        for path, (outputs, inputs) in sizes.items()
    }


def kept_parts(groups: ChannelGroups, kept: Mapping[ChannelGroup, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The sizes of the parts of every node that divides channels of groups that keep some of their channels."""
    counts = [len(kept.get(group, range(group.size))) for group in groups.groups]
    return {
        node: tuple(sum(counts[k] for k in part) for part in parts)
        for node, parts in groups.of_parts.items()
        if any(groups.groups[k] in kept for part in parts for k in part)
    }


def resize_divisions(module: fx.GraphModule, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Change the sizes of the parts of the nodes of these names, in place, without a new compilation of the graph."""
    for node in module.graph.nodes:
        if node.name in sizes:
            resize_parts(node, sizes[node.name])


def prune_channels(module: nn.Module, kept: Mapping[str, KeptChannels]) -> None:
    """Prune the modules and tensors at these paths, in place; kept channels keep their weights."""
    for path, channels in kept.items():
        target = resolve_attribute(module, path)
        if isinstance(target, nn.Conv2d):
            module.set_submodule(path, slice_conv(target, channels.kept_out, channels.kept_in))
        elif isinstance(target, nn.Linear):
            module.set_submodule(path, slice_linear(target, channels.kept_out, channels.kept_in))
        elif channels.kept_out is not None:
            owner, _, name = path.rpartition(".")
            slice_tensor(module.get_submodule(owner), name, channels.kept_out)


def _sizes(target: Tensor | nn.Module) -> tuple[int, int]:
    """The numbers of outputs and inputs; for a tensor those of entries and 0."""
    if isinstance(target, nn.Conv2d):
        return target.out_channels, target.in_channels
    if isinstance(target, nn.Linear):
        return target.out_features, target.in_features
    assert isinstance(target, Tensor)
    return len(target), 0


def _without(size: int, pruned: set[int] | None) -> tuple[int, ...] | None:
    return None if pruned is None else tuple(k for k in range(size) if k not in pruned)
