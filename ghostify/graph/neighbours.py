"""How a traced graph is wired around a convolution: who calls what, which norm follows, what its output is added to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import fx

from ghostify.graph.batchnorm import batchnorm_of, inner_modules
from ghostify.graph.methods import method_marks
from ghostify.graph.op_queries import (
    activation_input,
    activation_module,
    is_activation_module,
    is_add,
    is_identity_in_eval,
)
from ghostify.graph.program import Convolution, Program, called_module
from ghostify.modules.hooks import has_hooks


class GraphIndex:
    """A graph's nodes by name, and how many nodes call each module."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.nodes = {n.name: n for n in module.graph.nodes}
        self.uses = Counter(id(called_module(module, n)) for n in module.graph.nodes if n.op == "call_module")

    def is_called_once(self, node: fx.Node) -> bool:
        """Whether the node is the only one that calls its module."""
        return self.uses[id(called_module(self.module, node))] == 1


def following_norm(wiring: GraphIndex, nodes: list[str]) -> str | None:
    """The BatchNorm with running statistics that alone reads a convolution's output, so that it can absorb a shift."""
    if len(nodes) != 1:
        return None
    node = None if method_marks(wiring.nodes[nodes[0]]) else only_user(wiring.nodes[nodes[0]])
    norm = None if node is None else batchnorm_of(wiring.module, node)
    if node is None or norm is None or norm.running_mean is None:
        return None
    return str(node.target) if wiring.is_called_once(node) and not has_hooks(norm) else None


def following_norm_of(program: Program, conv: Convolution) -> str | None:
    """`following_norm` of one convolution of a program, as a path in its part; who asks of many keeps a `GraphIndex` a
    part."""
    return following_norm(GraphIndex(program.subgraphs[conv.subgraph_path]), [call.node for call in conv.calls])


def following_activation(wiring: GraphIndex, nodes: list[str], norm: str | None) -> str | None:
    """The node that activates a convolution's output straight behind it and its norm, or the norm's that does both."""
    if len(nodes) != 1:
        return None
    node = wiring.nodes[nodes[0]]
    if norm is not None:
        node = next(iter(node.users))
        inner = inner_modules(called_module(wiring.module, node)).values()
        if inner:
            return node.name if all(map(is_activation_module, inner)) else None
    return next((user.name for user in node.users if _activates_alone(wiring.module, user, node)), None)


def _activates_alone(module: fx.GraphModule, user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` is an activation of `node`, and nobody else reads that but the gate of the activation itself."""
    if activation_module(module, user) is None or activation_input(module, user) is not node:
        return False
    return set(node.users) <= {user, *user.all_input_nodes}


def find_residual_operand(wiring: GraphIndex, nodes: list[str], norm: str | None) -> str | None:
    """The node that is added to a convolution's output behind its norm, but for what is silent in evaluation."""
    if len(nodes) != 1:
        return None
    node, awaited = wiring.nodes[nodes[0]], norm
    for user in sole_consumers(node):
        if awaited is None and (summand := _summand(user, node)) is not None:
            return _source(wiring, summand).name
        if awaited is not None and user.target == awaited:
            if inner_modules(called_module(wiring.module, user)):
                return None
            awaited = None
        elif not is_identity_in_eval(wiring.module, user):
            return None
        node = user
    return None


def _summand(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """What `user` adds to `node`, if that is what it does."""
    others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
    return others[0] if is_add(user) and len(others) == 1 and not user.kwargs else None


def _source(wiring: GraphIndex, node: fx.Node) -> fx.Node:
    """The node itself, or what it hands on unchanged in evaluation."""
    while is_identity_in_eval(wiring.module, node):
        node = node.all_input_nodes[0]
    return node


def sole_consumers(node: fx.Node) -> Iterator[fx.Node]:
    """The one node that reads this one, the one that reads that, and so on, up to where several read, or nobody."""
    while (user := only_user(node)) is not None:
        yield user
        node = user


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None
