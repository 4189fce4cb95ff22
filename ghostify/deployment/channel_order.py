"""Channel orders of an inference graph: permuted weights in place of reordered outputs, wherever possible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ghostify.graph.executor import Values, execute
from ghostify.graph.inputs import PlaceholderValues, cloned
from ghostify.pruning.channel_groups import find_channel_groups
from ghostify.pruning.permutation import permute_group


class ChannelOrders:
    """A channel order for each channel group of a graph; `apply` puts them into effect.

    `concatenations` are the nodes that compute intrinsic maps and ghosts in an order of their own, with the original
    index of each channel; `shapes` those of the nodes' outputs. A group takes the order of the first concatenation in
    it, or the original order where its channels cannot be permuted.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        concatenations: Mapping[fx.Node, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.module = module
        self.computed = {node: concatenations[node] for node in module.graph.nodes if node in concatenations}
        sources = {node.name: len(order) for node, order in self.computed.items()}
        channels = find_channel_groups(module, sources, shapes)
        self.groups, self.groups_of = channels.groups, channels.of_node
        self.orders = [torch.arange(group.size) for group in self.groups]
        for node, order in reversed(self.computed.items()):
            first, *others = self.groups_of[node.name]
            if not others and self.groups[first].permuting_obstacle is None:
                self.orders[first] = order

    def reordered(self) -> list[fx.Node]:
        """The concatenations whose output must be reordered, since their order is not that of their groups."""
        return [node for node, order in self.computed.items() if not torch.equal(self._order(node), order)]

    @torch.no_grad()
    def apply(self) -> None:
        """Permute weights, and reorder outputs where that is not enough; in place."""
        for group, order in zip(self.groups, self.orders, strict=True):
            if not torch.equal(order, torch.arange(group.size)):
                permute_group(self.module, group, order)
        for node in self.reordered():
            self._reorder(node, torch.argsort(self.computed[node])[self._order(node)])
        self.module.graph.lint()
        self.module.recompile()

    def _order(self, node: fx.Node) -> Tensor:
        """The order of a node's channels after `apply`, as original indices."""
        orders, start = [], 0
        for order in (self.orders[group] for group in self.groups_of[node.name]):
            orders.append(start + order)
            start += len(order)
        return torch.cat(orders)

    def _reorder(self, node: fx.Node, index: Tensor) -> None:
        """Insert an `index_select` of channels after a node."""
        name = f"{node.name}_order"
        device = next(self.module.parameters()).device
        self.module.register_buffer(name, index.to(device))
        with self.module.graph.inserting_after(node):
            index_node = self.module.graph.get_attr(name)
        with self.module.graph.inserting_after(index_node):
            selected = self.module.graph.call_function(torch.index_select, (node, 1, index_node))
        node.replace_all_uses_with(selected, delete_user_cb=lambda user: user is not selected)


def record_shapes(module: fx.GraphModule, inputs: PlaceholderValues) -> dict[str, tuple[int, ...]]:
    """The output shape of every node that computes a tensor, by name, for these inputs."""
    shapes: dict[str, tuple[int, ...]] = {}

    def record(node: fx.Node, value: Any, _: Values) -> Any:
        if isinstance(value, Tensor):
            shapes[node.name] = tuple(value.shape)
        return value

    with torch.no_grad():
        execute(module, cloned(inputs.values), record)
    return shapes
