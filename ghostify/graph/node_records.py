"""The nodes of a graph as plain data that pickle can store, and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from ghostify.imports import import_object

OWN_META = "ghostify"


@dataclass(frozen=True)
class NodeName:
    """A node among the arguments of another, by name."""

    name: str


@dataclass(frozen=True)
class FunctionName:
    """A function by its import name, where pickle would look for it under another."""

    name: str


@dataclass(frozen=True)
class NodeRecord:
    """A node of a graph; its arguments name other nodes, and `meta` holds the entries of this package only."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]


def record_nodes(graph: fx.Graph) -> list[NodeRecord]:
    """The nodes of a graph in order, as plain data."""
    return [
        NodeRecord(
            node.name,
            node.op,
            _storable(node.target),
            map_aggregate(node.args, _storable),
            map_aggregate(node.kwargs, _storable),
            {key: value for key, value in node.meta.items() if key.startswith(OWN_META)},
        )
        for node in graph.nodes
    ]


def build_graph(records: Iterable[NodeRecord]) -> fx.Graph:
    """The graph of these nodes."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def restore(value: Any) -> Any:
        if isinstance(value, NodeName):
            return nodes[value.name]
        return import_object(value.name) if isinstance(value, FunctionName) else value

    for record in records:
        args: Any = map_aggregate(record.args, restore)
        kwargs: Any = map_aggregate(record.kwargs, restore)
        node = graph.create_node(record.op, restore(record.target), args, kwargs, name=record.name)
        node.meta |= record.meta
        nodes[record.name] = node
    return graph


def _storable(value: Any) -> Any:
    """A node by its name, and a function that PyTorch defines inside another by its public name."""
    if isinstance(value, fx.Node):
        return NodeName(value.name)
    if "<locals>" in getattr(value, "__qualname__", ""):
        name = f"{value.__module__}:{value.__name__}"
        try:
            return FunctionName(name) if import_object(name) is value else value
        except (ImportError, AttributeError):
            return value
    return value
