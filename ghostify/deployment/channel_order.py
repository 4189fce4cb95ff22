"""Channel orders carried through an inference graph to whoever reads by channel, so that nothing need be gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ghostify.deployment.folding import ORDER
from ghostify.pruning.channel_groups import find_channel_groups
from ghostify.pruning.permutation import permute_group

SHAPE = "ghostify_shape"  # in a node's meta: the shape of what it makes of the example inputs


class ChannelOrders:
    """An order for each channel group of a graph; `apply` settles them by permuting weights, and gathers where that is
    not enough.

    Ghosts come in orders of their own. A group takes that of the first ghosts in it, unless somebody needs the
    original's.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.ghosts = [node for node in module.graph.nodes if ORDER in node.meta]
        shapes = {n.name: n.meta[SHAPE] for n in module.graph.nodes if n.meta.get(SHAPE) is not None}
        found = find_channel_groups(module, {n.name: len(n.meta[ORDER]) for n in self.ghosts}, shapes)
        self.groups, self.groups_of = found.groups, found.of_node
        self.orders = [torch.arange(group.size) for group in self.groups]
        for ghost in reversed(self.ghosts):
            first, *others = self.groups_of[ghost.name]
            if not others and self.groups[first].permuting_obstacle is None:
                self.orders[first] = ghost.meta[ORDER]

    def gathers(self) -> list[fx.Node]:
        """The ghosts' nodes whose order nobody takes up."""
        return [ghost for ghost in self.ghosts if not torch.equal(self._order(ghost), ghost.meta[ORDER])]

    @torch.no_grad()
    def apply(self) -> None:
        """Permute weights, and gather where that is not enough; in place."""
        for group, order in zip(self.groups, self.orders, strict=True):
            if not torch.equal(order, torch.arange(group.size)):
                permute_group(self.module, group, order)
        for ghost in self.gathers():
            self._gather(ghost, torch.argsort(ghost.meta[ORDER])[self._order(ghost)])
        self.module.graph.lint()
        self.module.recompile()

    def _order(self, node: fx.Node) -> Tensor:
        """The order in which a node's channels are wanted."""
        orders, start = [], 0
        for order in (self.orders[group] for group in self.groups_of[node.name]):
            orders.append(start + order)
            start += len(order)
        return torch.cat(orders)

    def _gather(self, node: fx.Node, index: Tensor) -> None:
        name = f"{node.name}_order"
        like = next(self.module.parameters())
        self.module.register_buffer(name, index.to(like.device))
        with self.module.graph.inserting_after(node):
            held = self.module.graph.get_attr(name)
        with self.module.graph.inserting_after(held):
            made = self.module.graph.call_function(torch.index_select, (node, 1, held))
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def record_shapes(module: fx.GraphModule, *inputs: Any) -> None:
    """Note the shape of every node's output, as it is for `inputs`."""

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            made = super().run_node(n)
            n.meta[SHAPE] = tuple(made.shape) if isinstance(made, Tensor) else None
            return made

    with torch.no_grad():
        Shapes(module).run(*inputs, enable_io_processing=False)
