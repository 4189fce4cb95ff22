"""Neighbours of a convolution in its graph: the following norm, the activation, the residual operand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import fx, nn

from ghostify.graph.batchnorm import batchnorm_of, inner_modules
from ghostify.graph.methods import method_marks
from ghostify.graph.op_queries import (
    activation_input,
    activation_module,
    is_activation_module,
    is_add,
    is_identity_in_eval,
)
from ghostify.graph.paths import called_module, resolve_attribute
from ghostify.graph.program import Convolution, Program
from ghostify.modules.hooks import has_hooks


class GraphIndex:
    """A graph's nodes by name, the number of nodes that call each module, and the parameters that nodes fetch."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.nodes = {n.name: n for n in module.graph.nodes}
        self.call_counts = Counter(id(called_module(module, n)) for n in module.graph.nodes if n.op == "call_module")
        self.fetched = {id(resolve_attribute(module, str(n.target))) for n in module.graph.nodes if n.op == "get_attr"}

    def is_called_once(self, node: fx.Node) -> bool:
        """Whether the node is the only one that calls its module."""
        return self.call_counts[id(called_module(self.module, node))] == 1

    def is_read(self, module: nn.Module) -> bool:
        """Whether nodes fetch a parameter of a module, so that it must keep its values."""
        return any(id(p) in self.fetched for p in module.parameters())


def following_norm(index: GraphIndex, nodes: list[str]) -> str | None:
    """The path of the BatchNorm with running statistics that is the only user of a convolution's output.

    Such a norm can absorb a constant shift of each channel. `nodes` are the names of the nodes that call the
    convolution; several give None.
    """
    if len(nodes) != 1:
        return None
    conv = index.nodes[nodes[0]]
    user = None if method_marks(conv) else only_user(conv)
    norm = None if user is None else batchnorm_of(index.module, user)
    if user is None or norm is None or norm.running_mean is None:
        return None
    return str(user.target) if index.is_called_once(user) and not has_hooks(norm) else None


def following_norm_of(program: Program, conv: Convolution) -> str | None:
    """`following_norm` of one convolution of a program, as a path in its subgraph.

    It indexes the subgraph; for many convolutions, keep one `GraphIndex` per subgraph.
    """
    return following_norm(GraphIndex(program.subgraphs[conv.subgraph_path]), [call.node for call in conv.calls])


def following_activation(index: GraphIndex, nodes: list[str], norm: str | None) -> str | None:
    """The name of the node that activates a convolution's output right after it and its norm.

    Where the norm contains the activation, it is the norm's own node. `nodes` and None as in `following_norm`.
    """
    if len(nodes) != 1:
        return None
    node = index.nodes[nodes[0]]
    if norm is not None:
        node = next(iter(node.users))
        inner = inner_modules(called_module(index.module, node)).values()
        if inner:
            return node.name if all(map(is_activation_module, inner)) else None
    return next((user.name for user in node.users if _activates_exclusively(index.module, user, node)), None)


def _activates_exclusively(module: fx.GraphModule, user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` is an activation of `node`, and the only other users of `node` are that activation's gate."""
    if activation_module(module, user) is None or activation_input(module, user) is not node:
        return False
    return set(node.users) <= {user, *user.all_input_nodes}


def find_residual_operand(index: GraphIndex, nodes: list[str], norm: str | None) -> str | None:
    """The name of the node that a residual add combines with a convolution's output, after the norm.

    Nodes that are the identity in evaluation are skipped on both sides of the add. `nodes` and None as in
    `following_norm`.
    """
    if len(nodes) != 1:
        return None
    node, pending_norm = index.nodes[nodes[0]], norm
    for user in sole_consumers(node):
        if pending_norm is None and (operand := _other_operand(user, node)) is not None:
            return _skip_identities(index, operand).name
        if pending_norm is not None and user.target == pending_norm:
            if inner_modules(called_module(index.module, user)):
                return None
            pending_norm = None
        elif not is_identity_in_eval(index.module, user):
            return None
        node = user
    return None


def _other_operand(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """What `user` adds to `node`; None where it is not an addition."""
    others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
    return others[0] if is_add(user) and len(others) == 1 and not user.kwargs else None


def _skip_identities(index: GraphIndex, node: fx.Node) -> fx.Node:
    """The node, or the input of the chain of nodes before it that are the identity in evaluation."""
    while is_identity_in_eval(index.module, node):
        node = node.all_input_nodes[0]
    return node


def sole_consumers(node: fx.Node) -> Iterator[fx.Node]:
    """The only user of a node, the only user of that one, and so on, up to a node with several users or none."""
    while (user := only_user(node)) is not None:
        yield user
        node = user


def only_user(node: fx.Node) -> fx.Node | None:
    """The only user of a node, None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None
