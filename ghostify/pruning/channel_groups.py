"""Channel groups of a traced graph: the channels that must be permuted, or pruned, together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx

from ghostify.pruning.channel_runs import ChannelRun, pieces_of
from ghostify.pruning.propagation import ChannelUse, Propagation, Role


@dataclass(frozen=True)
class Member:
    """`count` channels, from `start` on, of those that a module or tensor computes, has parameters for, or reads.

    `path` is the path in the graph's module of a convolution, of a linear layer, or of a tensor for parameters other
    than a depthwise convolution's. `node` is the name of the node that calls or fetches it. A channel that is read has
    `width` inputs, more than one where a linear layer reads flattened maps. `pooled`: each map has one position.
    `weight_obstacle` is the reason why its own weights cannot be changed. `gate`: it is a convolution of a
    squeeze-excite block that scales the group's channels by factors computed from their means.
    """

    node: str
    path: str
    start: int
    count: int
    width: int = 1
    pooled: bool = False
    weight_obstacle: str | None = None
    gate: bool = False


@dataclass(frozen=True)
class ChannelGroup:
    """`size` channels that change together: their producers, the parameters that belong to them, their consumers.

    `order_obstacle` is the reason why their order must stay, `count_obstacle` why their number must, None where nothing
    prevents a change. `residual`: the outputs of several producers are added.
    """

    size: int
    producers: tuple[Member, ...] = ()
    parameters: tuple[Member, ...] = ()
    consumers: tuple[Member, ...] = ()
    order_obstacle: str | None = None
    count_obstacle: str | None = None
    residual: bool = False

    @property
    def permuting_obstacle(self) -> str | None:
        """The reason why the order of the channels cannot be changed by changing weights, None if it can."""
        return self.order_obstacle or next((m.weight_obstacle for m in self.producers if m.weight_obstacle), None)

    @property
    def pruning_obstacle(self) -> str | None:
        """The reason why channels cannot be pruned, None if they can."""
        return self.permuting_obstacle or self.count_obstacle


@dataclass(frozen=True)
class ChannelGroups:
    """The groups of a graph, and for every node whose channels are known the indices of their groups, in order.

    `of_parts` holds the same for each part of every node that divides channels (see `divisions`).
    """

    groups: tuple[ChannelGroup, ...]
    of_node: Mapping[str, tuple[int, ...]]
    of_parts: Mapping[str, tuple[tuple[int, ...], ...]]


def find_channel_groups(
    module: fx.GraphModule,
    sources: Mapping[str, int] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> ChannelGroups:
    """All channel groups of the graph, in the order in which the graph computes their channels.

    `sources` are names of nodes that compute new channels from inputs in the original order, with the number of these
    channels. `shapes` of the nodes' outputs, where known, settle reshapes and sums that the graph alone does not.
    """
    propagation = Propagation(module, sources or {}, shapes or {})
    values = propagation.values
    runs = [run for value in values.values() for run in value.runs]
    runs += [run for parts in propagation.parts.values() for part in parts for run in part.runs]
    pieces = dict.fromkeys(pieces_of(runs))
    indices = {piece: k for k, piece in enumerate(pieces)}
    members: list[list[tuple[Role, Member]]] = [[] for _ in pieces]
    for use in propagation.uses:
        for piece, member in _members(use):
            members[indices[piece]].append((use.role, member))
    nodes = {node.name: node for node in module.graph.nodes}
    groups = tuple(_group(piece, piece_members, nodes) for piece, piece_members in zip(pieces, members, strict=True))
    of_node = {node.name: tuple(indices[p] for p in pieces_of(value.runs)) for node, value in values.items()}
    of_parts = {
        node.name: tuple(tuple(indices[p] for p in pieces_of(part.runs)) for part in parts)
        for node, parts in propagation.parts.items()
    }
    return ChannelGroups(groups, of_node, of_parts)


def _members(use: ChannelUse) -> Iterator[tuple[ChannelRun, Member]]:
    """A use of channels, split at the boundaries of the runs that these consist of."""
    start = 0
    for piece in pieces_of(use.channels.runs):
        pooled = use.channels.layout.pooled
        yield piece, Member(use.node.name, use.path, start, piece.size, use.width, pooled, use.weight_obstacle)
        start += piece.size


def _group(piece: ChannelRun, members: list[tuple[Role, Member]], nodes: Mapping[str, fx.Node]) -> ChannelGroup:
    producers, parameters, consumers = (tuple(m for role, m in members if role is wanted) for wanted in Role)
    squeeze_excites = dict(_squeeze_excites(producers, consumers, nodes))
    gates = {*squeeze_excites, *squeeze_excites.values()}
    producers, consumers = (
        tuple(replace(m, gate=True) if m.node in gates else m for m in role_members)
        for role_members in (producers, consumers)
    )
    return ChannelGroup(
        piece.size, producers, parameters, consumers, piece.order_obstacle, piece.count_obstacle, piece.residual
    )


def _squeeze_excites(
    producers: tuple[Member, ...], consumers: tuple[Member, ...], nodes: Mapping[str, fx.Node]
) -> Iterator[tuple[str, str]]:
    """Last and first convolution of each squeeze-excite block: the producer of factors, the consumer of means."""
    pooled_consumers = {consumer.node for consumer in consumers if consumer.pooled}
    for producer in producers:
        node: fx.Node | None = nodes[producer.node].all_input_nodes[0] if producer.pooled else None
        while node is not None and node.name not in pooled_consumers:
            node = node.all_input_nodes[0] if node.all_input_nodes else None
        if node is not None:
            yield producer.node, node.name
