"""Channel groups of a program that can be pruned, and the convolutions that remain after pruning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ghostify.graph.program import Convolution, Program
from ghostify.pruning import obstacles
from ghostify.pruning.channel_groups import ChannelGroup, Member, find_channel_groups
from ghostify.pruning.kept_channels import KeptChannels, kept_by_path


@dataclass(frozen=True)
class GroupMember:
    """A convolution of a group, and whether pruning removes its outputs or inputs; `gate` as in `Member`."""

    conv: Convolution
    prunes_outputs: bool
    prunes_inputs: bool
    gate: bool = False


@dataclass(frozen=True)
class PruningGroup:
    """A channel group of the subgraph at a path whose members can all be pruned and whose consumers are convolutions.

    Pruning suits channels that are nearly linear combinations of others where they are read: the consumers' filters
    absorb them.
    """

    subgraph_path: str
    channels: ChannelGroup
    members: tuple[GroupMember, ...]

    @property
    def size(self) -> int:
        return self.channels.size

    @property
    def dense(self) -> tuple[Convolution, ...]:
        """The convolutions of the group except depthwise ones and gates."""
        return tuple(m.conv for m in self.members if m.conv.groups == 1 and not m.gate)

    @property
    def consumers(self) -> tuple[Convolution, ...]:
        """The convolutions that are refitted to fewer inputs; gates are not."""
        return tuple(m.conv for m in self.members if m.prunes_inputs and m.conv.groups == 1 and not m.gate)


@dataclass(frozen=True)
class Unprunable:
    """A channel group that cannot be pruned: the name of its first producer, and the reason (see `obstacles`)."""

    name: str
    reason: str


def find_pruning_groups(program: Program) -> Iterator[PruningGroup | Unprunable]:
    """Every channel group with a producer among the program's convolutions, by subgraph, in order of first use."""
    for path, subgraph in program.subgraphs.items():
        convs = {call.node: c for c in program.convolutions if c.subgraph_path == path for call in c.calls}
        for channels in find_channel_groups(subgraph).groups:
            producers = [convs[m.node] for m in channels.producers if m.node in convs]
            if not producers:
                continue
            obstacle = channels.pruning_obstacle or _unsupported_reason(channels, convs)
            if obstacle is None:
                yield PruningGroup(path, channels, tuple(_members(channels, convs)))
            else:
                yield Unprunable(producers[0].name, obstacle)


def _unsupported_reason(channels: ChannelGroup, convs: Mapping[str, Convolution]) -> str | None:
    """The reason why members cannot be pruned, or their consumers not refitted; None if they can."""
    for member in (*channels.producers, *channels.consumers):
        conv = convs.get(member.node)
        if conv is None:
            return obstacles.LINEAR.format(member.path)
        if conv.unsupported_reason is not None:
            return f"{conv.name}: {conv.unsupported_reason}"
    totals = [(m, convs[m.node].outputs) for m in channels.producers]
    totals += [(m, convs[m.node].inputs) for m in channels.consumers]
    partial = next((member for member, total in totals if member.count != total), None)
    if partial is not None:
        return obstacles.OTHER_CHANNELS.format(partial.path)
    return None if channels.consumers else obstacles.NO_CONSUMER


def _members(channels: ChannelGroup, convs: Mapping[str, Convolution]) -> Iterator[GroupMember]:
    """The convolutions of a group, each once, in the order of their first calls, gates last."""
    depthwise = [m for m in channels.parameters if m.node in convs]
    producers, consumers = _nodes(channels.producers, depthwise), _nodes(channels.consumers, depthwise)
    gates = {m.node for m in (*channels.producers, *channels.consumers) if m.gate}
    for node, conv in sorted(convs.items(), key=lambda item: item[0] in gates):
        if node in producers | consumers:
            yield GroupMember(conv, node in producers, node in consumers, node in gates)


def _nodes(*member_lists: Iterable[Member]) -> set[str]:
    return {member.node for members in member_lists for member in members}


def kept_by_conv(program: Program, kept: Mapping[PruningGroup, tuple[int, ...]]) -> dict[str, KeptChannels]:
    """The channels that convolutions keep, by name, when groups keep these; a convolution may be in two groups.

    The other tensors of a group are listed with its first convolution.
    """
    by_conv: dict[str, KeptChannels] = {}
    for path, subgraph in program.subgraphs.items():
        groups = [group for group in kept if group.subgraph_path == path]
        by_path = kept_by_path(subgraph, {group.channels: kept[group] for group in groups})
        for group in groups:
            for conv in (member.conv for member in group.members):
                channels = by_path[conv.local_path]
                if conv.groups > 1:
                    channels = replace(channels, kept_in=channels.kept_out)
                by_conv.setdefault(conv.name, channels)
            first, conv_paths = group.members[0].conv.name, {m.conv.local_path for m in group.members}
            tensor_paths = (m.path for m in group.channels.parameters if m.path not in conv_paths)
            tensors = tuple((path, by_path[path].kept_out or ()) for path in tensor_paths)
            by_conv[first] = replace(by_conv[first], tensors=by_conv[first].tensors + tensors)
    return by_conv


def pruned_conv(conv: Convolution, kept_out: int | None, kept_in: int | None) -> Convolution:
    """A dense or depthwise convolution with these numbers of outputs and inputs (None: all)."""
    outputs = conv.outputs if kept_out is None else kept_out
    if conv.groups > 1:
        return replace(conv, inputs=outputs, outputs=outputs, groups=outputs)
    return replace(conv, inputs=conv.inputs if kept_in is None else kept_in, outputs=outputs)


def conv_after_pruning(conv: Convolution, kept: KeptChannels) -> Convolution:
    """A dense or depthwise convolution with its kept channels only."""
    counts = (None if channels is None else len(channels) for channels in (kept.kept_out, kept.kept_in))
    return pruned_conv(conv, *counts)
