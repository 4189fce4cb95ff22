"""Run a traced graph node by node, with a callback after each node, and free values after their last use."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

Values = Mapping[fx.Node, Any]
NodeCallback = Callable[[fx.Node, Any, Values], Any]


def run_node(module: fx.GraphModule, node: fx.Node, values: Values) -> Any:
    """What a node computes from the values of the nodes that it reads; of a placeholder, `values` has it already."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    target: Any = node.target
    match node.op:
        case "placeholder":
            return values[node]
        case "get_attr":
            return operator.attrgetter(target)(module)
        case "call_module":
            return module.get_submodule(target)(*args, **kwargs)
        case "call_function":
            return target(*args, **kwargs)
        case "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        case _:
            return args[0]


def execute(module: fx.GraphModule, inputs: Sequence[Any], on_node: NodeCallback | None = None) -> Any:
    """The output of a traced module for `inputs`, the values of its placeholders in order.

    `on_node(node, value, values)` gets every node with its value and the values that are alive, and returns the value
    that later nodes read.
    """
    waiting, dead = iter(inputs), last_uses(module.graph)
    values: dict[fx.Node, Any] = {}
    result = None
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(waiting)
        result = run_node(module, node, values)
        if on_node is not None:
            result = on_node(node, result, values)
        values[node] = result
        for old in dead.get(node, ()):
            del values[old]
    return result


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The nodes whose values nothing reads after a node."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    uses: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        uses.setdefault(max(node.users, key=order.__getitem__, default=node), []).append(node)
    return uses
