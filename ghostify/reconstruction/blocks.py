"""Where a traced graph falls into blocks: runs of nodes that hand little over from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

LEAST, MAX_LAYERS = 2, 8


@dataclass(frozen=True)
class Block:
    """A run of nodes, by name.

    `live` is everything that later nodes read; `outputs` are those made here that a rewrite changes. `layers` are the
    rewritten convolutions that are called here and nowhere else.
    """

    nodes: tuple[str, ...]
    outputs: tuple[str, ...]
    live: tuple[str, ...]
    layers: tuple[str, ...]


def blocks_of(graph: fx.Graph, calls: Mapping[str, str]) -> list[Block]:
    """Cut the whole graph into blocks; `calls` has the nodes that call rewritten convolutions, and whose they are.

    A block ends where one value alone is live, once it has LEAST rewritten convolutions, just before the next one.
    Where that makes more than MOST, as with dense connections, a block may hand on a value for each of them.
    """
    flow = _Liveness(graph, calls)
    ends: list[int] = []
    start = 0
    for end in flow.ends(0, len(flow.nodes), everything=True):
        many = sum(n.name in calls for n in flow.nodes[start : end + 1]) > MAX_LAYERS
        ends += flow.ends(start, end + 1, everything=False) if many else [end]
        start = end + 1
    return [flow.block(a, b) for a, b in zip([0] + [e + 1 for e in ends], ends, strict=False)]


class _Liveness:
    """The nodes that compute, in order, and up to where the value of each is read."""

    def __init__(self, graph: fx.Graph, calls: Mapping[str, str]) -> None:
        self.graph, self.calls = graph, calls
        self.nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr")]
        self.place = {n: i for i, n in enumerate(self.nodes)}
        self.last = {n: max((self.place[u] for u in n.users), default=-1) for n in graph.nodes}
        self.fed = self._behind({n for n in graph.nodes if n.op == "placeholder"})
        self.changed = self._behind({n for n in self.nodes if n.name in calls})

    def _behind(self, sources: set[fx.Node]) -> set[fx.Node]:
        reached = set(sources)
        for node in self.nodes:
            if any(source in reached for source in node.all_input_nodes):
                reached.add(node)
        return reached

    def ends(self, start: int, stop: int, *, everything: bool) -> list[int]:
        """Last nodes of the blocks of a run."""
        ends: list[int] = []
        candidate: int | None = None
        first, convolutions = start, 0
        for i in range(start, stop):
            if self.nodes[i].name in self.calls:
                if candidate is not None:
                    ends.append(candidate)
                    first, convolutions, candidate = candidate + 1, 0, None
                convolutions += 1
            if convolutions >= LEAST and (self._live(i) <= 1 if everything else self._made(first, i) <= convolutions):
                candidate = i
        return [*ends, stop - 1]

    def _live(self, i: int) -> int:
        """How many values that come of the model's inputs are read behind node `i`."""
        return sum(n in self.fed and self.last[n] > i for n in self.nodes[: i + 1])

    def _made(self, first: int, i: int) -> int:
        """How many values that a rewrite changes and the nodes `first` to `i` made are read behind them."""
        return sum(n in self.changed and self.last[n] > i for n in self.nodes[first : i + 1])

    def block(self, start: int, end: int) -> Block:
        run = self.nodes[start : end + 1]
        fetched = {a for n in run for a in n.all_input_nodes if a.op == "get_attr"}
        nodes = tuple(n.name for n in self.graph.nodes if n in fetched or start <= self.place.get(n, -1) <= end)
        made = [n for n in self.graph.nodes if n.op != "get_attr" and self.place.get(n, -1) <= end]
        live = [n for n in made if self.last[n] > end or (n is run[-1] and n.op == "output")]
        outputs = tuple(n.name for n in live if n in self.changed and self.place.get(n, -1) >= start)
        inside = {n.name for n in run}
        elsewhere = {layer for node, layer in self.calls.items() if node not in inside}
        layers = dict.fromkeys(self.calls[n.name] for n in run if n.name in self.calls)
        return Block(nodes, outputs, tuple(n.name for n in live), tuple(k for k in layers if k not in elsewhere))
