"""Split of a traced graph into blocks: sequences of nodes with few live values between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

MIN_LAYERS, MAX_LAYERS = 2, 8


@dataclass(frozen=True)
class Block:
    """A sequence of nodes, by name.

    `live` names all values that later nodes read; `outputs` are those of this block that a rewrite changes. `layers`
    are the rewritten convolutions that are called in this block only.
    """

    nodes: tuple[str, ...]
    outputs: tuple[str, ...]
    live: tuple[str, ...]
    layers: tuple[str, ...]


def split_into_blocks(graph: fx.Graph, calls: Mapping[str, str]) -> list[Block]:
    """The blocks of a graph; `calls` maps nodes that call rewritten convolutions to the convolutions' names.

    A block ends where a single value is live, after at least `MIN_LAYERS` rewritten convolutions, just before the next
    one. Where that gives more than `MAX_LAYERS`, as with dense connections, as many values as the block has rewritten
    convolutions may be live at its end.
    """
    liveness = _Liveness(graph, calls)
    ends: list[int] = []
    start = 0
    for end in liveness.find_ends(0, len(liveness.nodes), all_values=True):
        is_large = sum(n.name in calls for n in liveness.nodes[start : end + 1]) > MAX_LAYERS
        ends += liveness.find_ends(start, end + 1, all_values=False) if is_large else [end]
        start = end + 1
    return [liveness.block(a, b) for a, b in zip([0] + [e + 1 for e in ends], ends, strict=False)]


class _Liveness:
    """The computing nodes of a graph in order, and the last node that reads the value of each."""

    def __init__(self, graph: fx.Graph, calls: Mapping[str, str]) -> None:
        self.graph, self.calls = graph, calls
        self.nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr")]
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.last_use = {n: max((self.position[u] for u in n.users), default=-1) for n in graph.nodes}
        self.from_inputs = self._descendants({n for n in graph.nodes if n.op == "placeholder"})
        self.changed = self._descendants({n for n in self.nodes if n.name in calls})

    def _descendants(self, sources: set[fx.Node]) -> set[fx.Node]:
        reached = set(sources)
        for node in self.nodes:
            if any(source in reached for source in node.all_input_nodes):
                reached.add(node)
        return reached

    def find_ends(self, start: int, stop: int, *, all_values: bool) -> list[int]:
        """Positions of the last nodes of the blocks in `start` to `stop`.

        With `all_values`, a single value that depends on the model's inputs may be live at an end. Otherwise as many
        changed values of the block as it has rewritten convolutions.
        """
        ends: list[int] = []
        candidate: int | None = None
        first, convolutions = start, 0
        for i in range(start, stop):
            if self.nodes[i].name in self.calls:
                if candidate is not None:
                    ends.append(candidate)
                    first, convolutions, candidate = candidate + 1, 0, None
                convolutions += 1
            if convolutions >= MIN_LAYERS and (
                self._count_live(i) <= 1 if all_values else self._count_live_changed(first, i) <= convolutions
            ):
                candidate = i
        return [*ends, stop - 1]

    def _count_live(self, i: int) -> int:
        """Number of values that depend on the model's inputs and are read after node `i`."""
        return sum(n in self.from_inputs and self.last_use[n] > i for n in self.nodes[: i + 1])

    def _count_live_changed(self, first: int, i: int) -> int:
        """Number of values of the nodes `first` to `i` that a rewrite changes and that are read after node `i`."""
        return sum(n in self.changed and self.last_use[n] > i for n in self.nodes[first : i + 1])

    def block(self, start: int, end: int) -> Block:
        block_nodes = self.nodes[start : end + 1]
        attributes = {a for n in block_nodes for a in n.all_input_nodes if a.op == "get_attr"}
        nodes = tuple(n.name for n in self.graph.nodes if n in attributes or start <= self.position.get(n, -1) <= end)
        computed = [n for n in self.graph.nodes if n.op != "get_attr" and self.position.get(n, -1) <= end]
        live = [n for n in computed if self.last_use[n] > end or (n is block_nodes[-1] and n.op == "output")]
        outputs = tuple(n.name for n in live if n in self.changed and self.position.get(n, -1) >= start)
        names = {n.name for n in block_nodes}
        called_outside = {layer for node, layer in self.calls.items() if node not in names}
        layers = dict.fromkeys(self.calls[n.name] for n in block_nodes if n.name in self.calls)
        return Block(nodes, outputs, tuple(n.name for n in live), tuple(k for k in layers if k not in called_outside))
