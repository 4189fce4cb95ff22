"""Run a traced graph node by node, with a callback after each node, and free values after their last use."""

from __future__ import annotations

import copy
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
    nodes = list(module.graph.nodes)
    placeholders = (node for node in nodes if node.op == "placeholder")
    return _run(module, nodes, dict(zip(placeholders, inputs, strict=False)), on_node)


def resume(module: fx.GraphModule, node: fx.Node, value: Any, live: Values, on_node: NodeCallback | None = None) -> Any:
    """The output of a traced module from `node` on, whose value is `value`; `live` are the values at that node, which
    stay as they are. `on_node` as in `execute`, for the nodes that follow."""
    nodes = list(module.graph.nodes)
    following = nodes[nodes.index(node) + 1 :]
    read = {source for later in following for source in later.all_input_nodes}
    values = {n: v for n, v in {**live, node: value}.items() if n in read}
    copies = copy.deepcopy(list(values.values()))  # which share memory where the values do
    return _run(module, following, dict(zip(values, copies, strict=True)), on_node) if following else value


def _run(
    module: fx.GraphModule, nodes: Sequence[fx.Node], values: dict[fx.Node, Any], on_node: NodeCallback | None
) -> Any:
    """The value of the last of `nodes`, from the values that they read."""
    last_used, value = last_uses(module.graph), None
    for node in nodes:
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
