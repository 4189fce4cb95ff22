"""Channel groups of a program that can be pruned, and the convolutions that remain after pruning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ghostify.graph.program import Convolution, Program
from ghostify.pruning import obstacles
from ghostify.pruning.channel_groups import ChannelGroup, Member, find_channel_groups
from ghostify.pruning.kept_channels import KeptChannels, kept_by_path, kept_parts

MAX_GROUPS_READ = 8  # with more, as in a DenseNet, a budget's program is not solved in its time


@dataclass(frozen=True)
class GroupMember:
    """A convolution or linear layer of a group, and how many outputs and inputs it loses with each pruned channel.

    `gate` as in `Member`.
    """

    conv: Convolution
    outputs_per_channel: int
    inputs_per_channel: int
    gate: bool = False

    @property
    def prunes_outputs(self) -> bool:
        """Whether it loses outputs."""
        return self.outputs_per_channel > 0

    @property
    def prunes_inputs(self) -> bool:
        """Whether it loses inputs."""
        return self.inputs_per_channel > 0

    def kept_counts(self, pruned: int) -> tuple[int | None, int | None]:
        """Its numbers of outputs and inputs without so many channels of the group; None: all."""
        outputs = self.conv.outputs - pruned * self.outputs_per_channel if self.prunes_outputs else None
        return outputs, self.conv.inputs - pruned * self.inputs_per_channel if self.prunes_inputs else None


@dataclass(frozen=True)
class PruningGroup:
    """A channel group of the subgraph at a path whose members can all be pruned.

    Pruning suits channels that are nearly linear combinations of others where they are read: the filters of the
    consumers, convolutions and linear layers, absorb them.
    """

    subgraph_path: str
    channels: ChannelGroup
    members: tuple[GroupMember, ...]

    @property
    def size(self) -> int:
        return self.channels.size

    @property
    def dense(self) -> tuple[Convolution, ...]:
        """The members of the group except depthwise convolutions and gates."""
        return tuple(m.conv for m in self.members if m.conv.groups == 1 and not m.gate)

    @property
    def refitted(self) -> tuple[tuple[Convolution, Member], ...]:
        """The members that are refitted to fewer inputs, each with a range of its inputs that are the group's channels;
        gates are not refitted."""
        convs = {member.conv.calls[0].node: member.conv for member in self.members}
        return tuple((convs[member.node], member) for member in self.channels.consumers if not member.gate)


@dataclass(frozen=True)
class Unprunable:
    """A channel group that cannot be pruned: the name of its first producer, and the reason (see `obstacles`)."""

    name: str
    reason: str


def find_pruning_groups(program: Program) -> Iterator[PruningGroup | Unprunable]:
    """Every channel group with a producer among the program's layers, by subgraph, in order of first use."""
    for path, subgraph in program.subgraphs.items():
        layers = (*program.convolutions, *program.linear_layers)
        convs = {call.node: c for c in layers if c.subgraph_path == path for call in c.calls}
        all_groups = find_channel_groups(subgraph).groups
        groups_read = Counter(node for channels in all_groups for node in {m.node for m in channels.consumers})
        for channels in all_groups:
            producers = [convs[m.node] for m in channels.producers if m.node in convs]
            if not producers:
                continue
            obstacle = channels.pruning_obstacle or _unsupported_reason(channels, convs, groups_read)
            if obstacle is None:
                yield PruningGroup(path, channels, tuple(_members(channels, convs)))
            else:
                yield Unprunable(producers[0].name, obstacle)


def _unsupported_reason(
    channels: ChannelGroup, convs: Mapping[str, Convolution], groups_read: Mapping[str, int]
) -> str | None:
    """The reason why members cannot be pruned, or their consumers not refitted; None if they can."""
    for member in (*channels.producers, *channels.consumers):
        conv = convs[member.node]
        if conv.unsupported_reason is not None:
            return f"{conv.name}: {conv.unsupported_reason}"
    for consumer in channels.consumers:
        if groups_read[consumer.node] > MAX_GROUPS_READ:
            return obstacles.MANY_GROUPS.format(consumer.path, MAX_GROUPS_READ)
    return None if channels.consumers else obstacles.NO_CONSUMER


def _members(channels: ChannelGroup, convs: Mapping[str, Convolution]) -> Iterator[GroupMember]:
    """The convolutions and linear layers of a group, each once, in the order of their first calls, gates last."""
    depthwise = [m for m in channels.parameters if m.node in convs]
    outputs, inputs = Counter[str](), Counter[str]()
    for member in (*channels.producers, *depthwise):
        outputs[member.node] += 1
    for member in (*channels.consumers, *depthwise):
        inputs[member.node] += member.width
    gates = {m.node for m in (*channels.producers, *channels.consumers) if m.gate}
    for node, conv in sorted(convs.items(), key=lambda item: item[0] in gates):
        if node in outputs or node in inputs:
            yield GroupMember(conv, outputs[node], inputs[node], node in gates)


def kept_by_conv(program: Program, kept: Mapping[PruningGroup, tuple[int, ...]]) -> dict[str, KeptChannels]:
    """The channels that the members of groups keep, by name, when the groups keep these; a member may be in several.

    The other tensors of groups are listed once, with the first member of the first group that they belong to, and nodes
    that divide channels with the first member of all.
    """
    by_conv: dict[str, KeptChannels] = {}
    for path, subgraph in program.subgraphs.items():
        groups = [group for group in kept if group.subgraph_path == path]
        kept_of_path = {group.channels: kept[group] for group in groups}
        by_path = kept_by_path(subgraph, kept_of_path)
        parts = tuple(kept_parts(find_channel_groups(subgraph), kept_of_path).items()) if groups else ()
        listed = set[str]()
        for group in groups:
            for conv in (member.conv for member in group.members):
                channels = by_path[conv.local_path]
                if conv.groups > 1:
                    channels = replace(channels, kept_in=channels.kept_out)
                by_conv.setdefault(conv.name, channels)
            first, conv_paths = group.members[0].conv.name, {m.conv.local_path for m in group.members}
            tensor_paths = dict.fromkeys(m.path for m in group.channels.parameters if m.path not in conv_paths | listed)
            tensors = tuple((path, by_path[path].kept_out or ()) for path in tensor_paths)
            channels = by_conv[first]
            by_conv[first] = replace(channels, tensors=channels.tensors + tensors, parts=channels.parts + parts)
            listed, parts = listed | tensor_paths.keys(), ()
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
