"""Channel orders carried through an inference graph to whoever reads by channel, so that nothing need be gathered."""

from __future__ import annotations

import math
import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.deploying.fold import ORDER
from ghostify.graph.batchnorm import BatchNorm
from ghostify.graph.op_queries import is_channel_independent, is_channel_independent_module, is_standard_conv
from ghostify.modules.hooks import has_hooks
from ghostify.planning.order import blind_inside, permute_inputs, permute_outputs
from ghostify.tracing.program import called
from ghostify.tracing.wiring import Wiring

SHAPE = "ghostify_shape"  # in a node's meta: the shape of what it makes of the example inputs
PAIRWISE = (
    operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, operator.truediv,
    torch.add, torch.mul, torch.sub, torch.div, torch.maximum, torch.minimum,
)  # fmt: skip
PAIRWISE_METHODS = ("add", "add_", "mul", "mul_", "sub", "sub_", "div", "div_")
ASKING = ("size", "dim")
MAPS, ROWS = 4, 2


@dataclass(eq=False)
class _Family:
    """Tensors whose channels stand in one common order.

    `wishes` are the nodes of ghosts that come in an order of their own; `makers` call what can make any order,
    `readers` what can read any, each channel so many columns wide; `parts` are what its channels are concatenated
    from. `pinned`: somebody needs the original order.
    """

    wishes: list[fx.Node] = field(default_factory=list)
    makers: list[fx.Node] = field(default_factory=list)
    readers: list[tuple[fx.Node, int]] = field(default_factory=list)
    parts: tuple[fx.Node, ...] = ()
    pinned: bool = False


class Orders:
    """Families of a graph's nodes; `apply` settles an order for each, and the weights and gathers that it takes."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.parents: dict[fx.Node, fx.Node] = {}
        self.families: dict[fx.Node, _Family] = {}
        self.used = Wiring(module).uses
        self.held = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
        self.ages = {node: k for k, node in enumerate(module.graph.nodes)}
        for node in module.graph.nodes:
            self._see(node)
        self._pin_parts()

    def family(self, node: fx.Node) -> _Family | None:
        """That of a node's output, if its channels have an order that anybody may choose."""
        return None if node not in self.parents else self.families[self._root(node)]

    def gathers(self) -> list[fx.Node]:
        """The ghosts' nodes whose order nobody takes up."""
        chosen = self._chosen()
        return [w for r, f in self._all() for w in f.wishes if not torch.equal(chosen[r], w.meta[ORDER])]

    @torch.no_grad()
    def apply(self) -> None:
        """Permute weights, and gather where that is not enough; in place."""
        chosen = self._chosen()
        for root, family in self._all():
            order = chosen[root]
            for maker in family.makers:
                permute_outputs(called(self.module, maker), order)
            for reader, spread in family.readers:
                permute_inputs(called(self.module, reader), order, spread)
            for wish in family.wishes:
                if not torch.equal(wish.meta[ORDER], order):
                    self._gather(wish, torch.argsort(wish.meta[ORDER])[order])
        self.module.graph.lint()
        self.module.recompile()

    def _gather(self, node: fx.Node, index: Tensor) -> None:
        name = f"{node.name}_order"
        like = next(self.module.parameters())
        self.module.register_buffer(name, index.to(like.device))
        with self.module.graph.inserting_after(node):
            held = self.module.graph.get_attr(name)
        with self.module.graph.inserting_after(held):
            made = self.module.graph.call_function(torch.index_select, (node, 1, held))
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)

    def _chosen(self) -> dict[fx.Node, Tensor]:
        """An order for every family, by its root: the first ghost's, or that of its parts, or the original."""
        chosen: dict[fx.Node, Tensor] = {}
        for root, family in self._all():
            channels = root.meta[SHAPE][1]
            if family.pinned or not (family.wishes or family.parts):
                chosen[root] = torch.arange(channels)
            elif family.parts:
                places, orders = 0, []
                for part in family.parts:
                    own = self.family(part)
                    count = part.meta[SHAPE][1]
                    orders.append(places + (torch.arange(count) if own is None else chosen[self._root(part)]))
                    places += count
                chosen[root] = torch.cat(orders)
            else:
                chosen[root] = family.wishes[0].meta[ORDER]
        return chosen

    def _all(self) -> list[tuple[fx.Node, _Family]]:
        """Families by their roots, parts of others before those."""
        return sorted(self.families.items(), key=lambda item: self.ages[item[0]])

    def _pin_parts(self) -> None:
        """Families that need the original order need it of their parts."""
        waiting = [f for f in self.families.values() if f.pinned]
        while waiting:
            for part in waiting.pop().parts:
                family = self.family(part)
                if family is not None and not family.pinned:
                    family.pinned = True
                    waiting.append(family)

    def _root(self, node: fx.Node) -> fx.Node:
        while self.parents[node] is not node:
            node = self.parents[node]
        return node

    def _begin(self, node: fx.Node) -> _Family:
        self.parents[node] = node
        self.families[node] = _Family()
        return self.families[node]

    def _join(self, node: fx.Node, *others: fx.Node) -> None:
        """The node's channels stand as those of the others do, which therefore stand alike."""
        first = min((self._root(o) for o in others), key=self.ages.__getitem__)
        self.parents[node] = first
        for other in others:
            root = self._root(other)
            if root is first:
                continue
            one, two = self.families[first], self.families.pop(root)
            self.parents[root] = first
            one.wishes += two.wishes
            one.makers += two.makers
            one.readers += two.readers
            one.pinned |= two.pinned or bool(one.parts or two.parts)
            one.parts += two.parts

    def _pin(self, nodes: list[fx.Node]) -> None:
        for node in nodes:
            family = self.family(node)
            if family is not None:
                family.pinned = True

    def _see(self, node: fx.Node) -> None:
        """Sort one node into the families of what it reads, as far as it treats channels alike."""
        known = [n for n in node.all_input_nodes if n in self.parents]
        shape, joined = node.meta.get(SHAPE), _concatenated(node)
        if ORDER in node.meta:
            self._pin(known)
            self._begin(node).wishes.append(node)
        elif node.op == "call_module":
            self._see_module(node, called(self.module, node), known)
        elif not known or _asks(node):
            return
        elif joined and all(n in self.parents for n in joined):
            self._begin(node).parts = joined
        elif shape is not None and self._is_blind(node, known):
            self._join(node, *known)
        else:
            self._pin(known)

    def _see_module(self, node: fx.Node, inner: nn.Module, known: list[fx.Node]) -> None:
        source: Any = node.args[0] if node.args else None
        alone = self.used[id(inner)] == 1 and all(self.held[id(p)] == 1 for p in inner.parameters(recurse=False))
        if has_hooks(inner):
            self._pin(known)
        elif is_channel_independent_module(inner) or _flattens_module(node, inner):
            if known:
                self._join(node, *known)
        elif isinstance(inner, nn.Conv2d) and inner.groups == 1 and is_standard_conv(inner) and alone:
            if source in self.parents:
                self.families[self._root(source)].readers.append((node, 1))
            self._begin(node).makers.append(node)
        elif source in self.parents and alone and _is_by_channel(inner):
            self._join(node, source)
            self.families[self._root(node)].makers.append(node)
        elif source in self.parents and alone and isinstance(inner, nn.Linear) and _is_rows(source):
            channels = self._root(source).meta[SHAPE][1]
            self.families[self._root(source)].readers.append((node, inner.in_features // channels))
        else:
            self._pin(known)

    def _is_blind(self, node: fx.Node, known: list[fx.Node]) -> bool:
        """Whether each channel of the node is made of the same channel of all that it reads."""
        shape, inputs = node.meta[SHAPE], [n for n in node.all_input_nodes if n.meta.get(SHAPE) is not None]
        if is_channel_independent(self.module, node) or _flattens(node):
            return len(inputs) == 1
        if node.target in (PAIRWISE if node.op == "call_function" else PAIRWISE_METHODS):
            alike = {n.meta[SHAPE][1] for n in known} == {shape[1]} and {len(n.meta[SHAPE]) for n in known} == {MAPS}
            return alike and all(math.prod(n.meta[SHAPE]) == 1 for n in inputs if n not in self.parents)
        return False


def record_shapes(module: fx.GraphModule, *inputs: Any) -> None:
    """Note the shape of every node's output, as it is for `inputs`."""

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            made = super().run_node(n)
            n.meta[SHAPE] = tuple(made.shape) if isinstance(made, Tensor) else None
            return made

    with torch.no_grad():
        Shapes(module).run(*inputs, enable_io_processing=False)


def _asks(node: fx.Node) -> bool:
    """Whether it only asks for a shape, a type or a device."""
    asked = (
        node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim")
    )
    return asked or (node.op == "call_method" and node.target in ASKING)


def _concatenated(node: fx.Node) -> tuple[fx.Node, ...]:
    """What it concatenates channel after channel, if it does."""
    if node.op != "call_function" or node.target is not torch.cat or not isinstance(node.args[0], list | tuple):
        return ()
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    by_channel = dim in (1, 1 - MAPS) and len(node.meta.get(SHAPE) or ()) == MAPS
    return tuple(n for n in node.args[0] if isinstance(n, fx.Node)) if by_channel else ()


def _flattens(node: fx.Node) -> bool:
    """Whether it makes rows of maps, channel by channel: by flattening, or by a mean over all positions."""
    source, shape = node.all_input_nodes[0], node.meta[SHAPE]
    before: tuple[int, ...] = source.meta.get(SHAPE) or ()
    name = getattr(node.target, "__name__", node.target)
    if len(before) != MAPS or name not in ("flatten", "view", "reshape", "mean", "squeeze"):
        return False
    if name == "mean":
        dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return dims is not None and {d % MAPS for d in (dims if isinstance(dims, list | tuple) else [dims])} == {2, 3}
    return shape == (before[0], math.prod(before[1:]))


def _flattens_module(node: fx.Node, inner: nn.Module) -> bool:
    return isinstance(inner, nn.Flatten) and inner.start_dim == 1 and len(node.meta.get(SHAPE) or ()) == ROWS


def _is_rows(node: Any) -> bool:
    return len(node.meta[SHAPE]) == ROWS


def _is_by_channel(inner: nn.Module) -> bool:
    """Whether it treats every channel by weights of that channel."""
    depthwise = isinstance(inner, nn.Conv2d) and inner.groups == inner.in_channels == inner.out_channels
    return depthwise or (isinstance(inner, BatchNorm) and blind_inside(inner))
