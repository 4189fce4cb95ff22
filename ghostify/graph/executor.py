"""Run a traced graph node by node, with a callback after each node, and free values after their last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from ghostify.graph.paths import resolve_attribute

Values = Mapping[fx.Node, Any]
NodeCallback = Callable[[fx.Node, Any, Values], Any]


def run_node(module: fx.GraphModule, node: fx.Node, values: Values) -> Any:
    """The value of a node, from the values of its input nodes; a placeholder's value is in `values` already."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    target: Any = node.target
    match node.op:
        case "placeholder":
            return values[node]
        case "get_attr":
            return resolve_attribute(module, target)
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

    `on_node(node, value, values)` is called for every node with its value and the live values; it returns the value
    that later nodes read.
    """
    remaining_inputs, last_used = iter(inputs), last_uses(module.graph)
    values: dict[fx.Node, Any] = {}
    value = None
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(remaining_inputs)
        value = run_node(module, node, values)
        if on_node is not None:
            value = on_node(node, value, values)
        values[node] = value
        for unused in last_used.get(node, ()):
            del values[unused]
    return value


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The nodes whose values are not read after a node, by that node."""
    positions = {n: i for i, n in enumerate(graph.nodes)}
    uses: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        uses.setdefault(max(node.users, key=positions.__getitem__, default=node), []).append(node)
    return uses
