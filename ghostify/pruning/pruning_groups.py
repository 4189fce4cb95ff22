"""Channel groups of a program that can be pruned, or why they cannot, and what pruning leaves of their convolutions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ghostify.graph.program import Convolution, Program
from ghostify.pruning.channel_groups import ChannelGroup, Member, find_channel_groups
from ghostify.pruning.kept_channels import KeptChannels, kept_by_path


@dataclass(frozen=True)
class GroupMember:
    """A convolution of a group: whether it loses outputs, and inputs; `gate` as in `Member`."""

    conv: Convolution
    prunes_outputs: bool
    prunes_inputs: bool
    gate: bool = False


@dataclass(frozen=True)
class PruningGroup:
    """A channel group of the part at a path, all of whose members can be pruned and whose consumers are convolutions.

    A channel that is nearly a linear combination of others where it is read is a ghost that costs nothing: the
    consumers' filters take it up.
    """

    part: str
    channels: ChannelGroup
    members: tuple[GroupMember, ...]

    @property
    def size(self) -> int:
        return self.channels.size

    @property
    def dense(self) -> tuple[Convolution, ...]:
        """The convolutions, but for depthwise ones and gates."""
        return tuple(m.conv for m in self.members if m.conv.groups == 1 and not m.gate)

    @property
    def consumers(self) -> tuple[Convolution, ...]:
        """The convolutions that take up what pruned channels held, but for gates."""
        return tuple(m.conv for m in self.members if m.prunes_inputs and m.conv.groups == 1 and not m.gate)


@dataclass(frozen=True)
class Unprunable:
    """A channel group that cannot be pruned, by the name of its first producer, and why."""

    name: str
    reason: str


def find_pruning_groups(program: Program) -> Iterator[PruningGroup | Unprunable]:
    """Every channel group that a convolution of the program makes, in order of first use in each part."""
    for path, part in program.subgraphs.items():
        convs = {call.node: c for c in program.convolutions if c.subgraph_path == path for call in c.calls}
        for channels in find_channel_groups(part).groups:
            makers = [convs[m.node] for m in channels.producers if m.node in convs]
            if not makers:
                continue
            obstacle = channels.pruning_obstacle or _unsupported_reason(channels, convs)
            if obstacle is None:
                yield PruningGroup(path, channels, tuple(_members(channels, convs)))
            else:
                yield Unprunable(makers[0].name, obstacle)


def _unsupported_reason(channels: ChannelGroup, convs: Mapping[str, Convolution]) -> str | None:
    """Why pruned channels would not be made good for, or could not be left out."""
    for member in (*channels.producers, *channels.consumers):
        conv = convs.get(member.node)
        if conv is None:
            return f"{member.path} is linear, and only convolutions are refitted"
        if conv.unsupported_reason is not None:
            return f"{conv.name}: {conv.unsupported_reason}"
    whole = [(m, convs[m.node].outputs) for m in channels.producers]
    whole += [(m, convs[m.node].inputs) for m in channels.consumers]
    beside = next((member for member, size in whole if member.count != size), None)
    if beside is not None:
        return f"{beside.path} has them beside others"
    return None if channels.consumers else "no convolution reads them"


def _members(channels: ChannelGroup, convs: Mapping[str, Convolution]) -> Iterator[GroupMember]:
    """The convolutions of a group, each once, in the order of their first calls, gates last."""
    between = [m for m in channels.parameters if m.node in convs]
    makes, reads = _nodes(channels.producers, between), _nodes(channels.consumers, between)
    gates = {m.node for m in (*channels.producers, *channels.consumers) if m.gate}
    for node, conv in sorted(convs.items(), key=lambda item: item[0] in gates):
        if node in makes | reads:
            yield GroupMember(conv, node in makes, node in reads, node in gates)


def _nodes(*members: tuple[Member, ...] | list[Member]) -> set[str]:
    return {member.node for own in members for member in own}


def kept_by_conv(program: Program, kept: Mapping[PruningGroup, tuple[int, ...]]) -> dict[str, KeptChannels]:
    """What is left of the convolutions of groups that keep these channels, by name: one may read one and make another.

    Tensors that go with the channels are named beside the group's first convolution.
    """
    found: dict[str, KeptChannels] = {}
    for path, part in program.subgraphs.items():
        groups = [group for group in kept if group.part == path]
        left = kept_by_path(part, {group.channels: kept[group] for group in groups})
        for group in groups:
            for conv in (member.conv for member in group.members):
                own = left[conv.local_path]
                found.setdefault(conv.name, own if conv.groups == 1 else replace(own, kept_in=own.kept_out))
            first, paths = group.members[0].conv, [m.path for m in group.channels.parameters]
            tensors = tuple(
                (p, left[p].kept_out or ()) for p in paths if p not in {m.conv.local_path for m in group.members}
            )
            found[first.name] = replace(found[first.name], tensors=found[first.name].tensors + tensors)
    return found


def pruned_conv(conv: Convolution, kept_out: int | None, kept_in: int | None) -> Convolution:
    """A dense or depthwise convolution with so many outputs and inputs (None: all)."""
    outputs = conv.outputs if kept_out is None else kept_out
    if conv.groups > 1:
        return replace(conv, inputs=outputs, outputs=outputs, groups=outputs)
    return replace(conv, inputs=conv.inputs if kept_in is None else kept_in, outputs=outputs)


def conv_after_pruning(conv: Convolution, kept: KeptChannels) -> Convolution:
    """A dense or depthwise convolution with the channels that are left."""
    return pruned_conv(conv, *(None if own is None else len(own) for own in (kept.kept_out, kept.kept_in)))
