"""Channel groups of a traced graph: which channels must be permuted, or pruned, together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx

from ghostify.pruning.channel_runs import ChannelRun, pieces_of
from ghostify.pruning.propagation import Propagation, Role, Use


@dataclass(frozen=True)
class Member:
    """`count` channels of a module or tensor, from `start` on of those that it makes, has parameters for, or reads.

    `path` names it in the graph's module: a convolution, a linear layer, or, for parameters that are no depthwise
    convolution's, the tensor. `node` names the node that calls or fetches it. Each channel that is read is `width`
    inputs wide, more than one where a linear layer reads flattened maps. `pooled`: the maps have one position each.
    `rigid` says why its own weights cannot be changed, `gate` that it is a convolution of a squeeze-excite block which
    scales the group's channels by what it pools from them.
    """

    node: str
    path: str
    start: int
    count: int
    width: int = 1
    pooled: bool = False
    rigid: str | None = None
    gate: bool = False


@dataclass(frozen=True)
class ChannelGroup:
    """`size` channels that change together: who makes them, whose parameters belong to them, and who reads them.

    `fixed` says why their order must stay, `counted` why their number must, None where nothing says so. `residual`:
    the outputs of several producers are added.
    """

    size: int
    producers: tuple[Member, ...] = ()
    parameters: tuple[Member, ...] = ()
    consumers: tuple[Member, ...] = ()
    fixed: str | None = None
    counted: str | None = None
    residual: bool = False

    @property
    def permuting_obstacle(self) -> str | None:
        """Why the order of the channels cannot be changed by changing weights."""
        rigid = (f"{member.path}: {member.rigid}" for member in self.producers if member.rigid)
        return self.fixed or next(rigid, None)

    @property
    def pruning_obstacle(self) -> str | None:
        """Why channels cannot be left out."""
        return self.permuting_obstacle or self.counted


@dataclass(frozen=True)
class ChannelGroups:
    """The groups of a graph, and for every node whose channels are known the numbers of their groups, in order."""

    groups: tuple[ChannelGroup, ...]
    of_node: Mapping[str, tuple[int, ...]]


def find_channel_groups(
    module: fx.GraphModule,
    sources: Mapping[str, int] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> ChannelGroups:
    """Every group of the graph, in the order in which the graph makes their channels.

    `sources` names nodes that make so many channels, in whatever order, of inputs in the original's order. `shapes` of
    the nodes' outputs, where known, decide on reshapes and sums that the graph alone does not.
    """
    propagation = Propagation(module, sources or {}, shapes or {})
    values, uses = propagation.values, propagation.uses
    pieces = dict.fromkeys(pieces_of(run for value in values.values() for run in value.runs))
    numbers = {piece: k for k, piece in enumerate(pieces)}
    members: list[list[tuple[Role, Member]]] = [[] for _ in pieces]
    for use in uses:
        for piece, member in _members(use):
            members[numbers[piece]].append((use.role, member))
    nodes = {node.name: node for node in module.graph.nodes}
    groups = tuple(_group(piece, own, nodes) for piece, own in zip(pieces, members, strict=True))
    of_node = {node.name: tuple(numbers[p] for p in pieces_of(value.runs)) for node, value in values.items()}
    return ChannelGroups(groups, of_node)


def _members(use: Use) -> Iterator[tuple[ChannelRun, Member]]:
    """A use of channels, by the pieces that these consist of."""
    start = 0
    for piece in pieces_of(use.value.runs):
        pooled = use.value.layout.pooled
        yield piece, Member(use.node.name, use.path, start, piece.size, use.width, pooled, use.rigid)
        start += piece.size


def _group(piece: ChannelRun, members: list[tuple[Role, Member]], nodes: Mapping[str, fx.Node]) -> ChannelGroup:
    producers, parameters, consumers = (tuple(m for role, m in members if role is wanted) for wanted in Role)
    gates = dict(_gates(producers, consumers, nodes))
    gated = {*gates, *gates.values()}
    producers, consumers = (
        tuple(replace(m, gate=True) if m.node in gated else m for m in own) for own in (producers, consumers)
    )
    return ChannelGroup(piece.size, producers, parameters, consumers, piece.fixed, piece.counted, piece.residual)


def _gates(
    producers: tuple[Member, ...], consumers: tuple[Member, ...], nodes: Mapping[str, fx.Node]
) -> Iterator[tuple[str, str]]:
    """The nodes of each squeeze-excite block: what makes factors of the group's pooled channels, what reads these."""
    reading = {consumer.node for consumer in consumers if consumer.pooled}
    for producer in producers:
        node: fx.Node | None = nodes[producer.node].all_input_nodes[0] if producer.pooled else None
        while node is not None and node.name not in reading:
            node = node.all_input_nodes[0] if node.all_input_nodes else None
        if node is not None:
            yield producer.node, node.name
