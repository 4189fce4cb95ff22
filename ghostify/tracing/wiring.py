"""How a traced graph is wired around a convolution: who calls what, which norm follows, what its output is added to."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from timm.layers import BatchNormAct2d, DropBlock2d, DropPath
from torch import fx, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth, stochastic_depth

from ghostify.tracing.program import Convolution, Program, called
from ghostify.tracing.views import marks_of

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)
SILENT_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath, DropBlock2d, StochasticDepth)
SILENT_FUNCTIONS = (F.dropout, F.dropout2d, stochastic_depth)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Mish)
ACTIVATION_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU, F.relu6: nn.ReLU6, F.silu: nn.SiLU,
    F.hardswish: nn.Hardswish, F.gelu: nn.GELU, F.mish: nn.Mish,
}  # fmt: skip
ACTIVATION_METHODS: dict[Any, type[nn.Module]] = {"relu": nn.ReLU, "relu_": nn.ReLU}
SUMS = (operator.add, operator.iadd, torch.add)
SUM_METHODS = ("add", "add_")
PRODUCTS = (operator.mul, operator.imul, torch.mul)
PRODUCT_METHODS = ("mul", "mul_")


class Wiring:
    """A graph's nodes by name, and how many nodes call each module."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.nodes = {n.name: n for n in module.graph.nodes}
        self.uses = Counter(id(called(module, n)) for n in module.graph.nodes if n.op == "call_module")

    def used_once(self, node: fx.Node) -> bool:
        """Whether the node is the only one that calls its module."""
        return self.uses[id(called(self.module, node))] == 1


def norm_after(wiring: Wiring, nodes: list[str]) -> str | None:
    """The BatchNorm with running statistics that alone reads a convolution's output, so that it can absorb a shift."""
    if len(nodes) != 1:
        return None
    node = None if marks_of(wiring.nodes[nodes[0]]) else only_user(wiring.nodes[nodes[0]])
    if node is None or node.op != "call_module":
        return None
    norm: Any = called(wiring.module, node)
    fits = isinstance(norm, NORMS) and norm.running_mean is not None and wiring.used_once(node) and not hooked(norm)
    return str(node.target) if fits else None


def norm_behind(program: Program, conv: Convolution) -> str | None:
    """`norm_after` of one convolution of a program, as a path in its part; who asks of many keeps a `Wiring` a part."""
    return norm_after(Wiring(program.parts[conv.part]), [call.node for call in conv.calls])


def activation_after(wiring: Wiring, nodes: list[str], norm: str | None) -> str | None:
    """The node that activates a convolution's output straight behind it and its norm, or the norm's that does both."""
    if len(nodes) != 1:
        return None
    node = wiring.nodes[nodes[0]]
    if norm is not None:
        node = next(iter(node.users))
        inner = [c for c in called(wiring.module, node).children() if not isinstance(c, nn.Identity)]
        if inner:
            return node.name if all(isinstance(c, ACTIVATIONS) for c in inner) else None
    user = only_user(node)
    return user.name if user is not None and activation_of(wiring.module, user) is not None else None


def activation_of(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """A module that does what an activation node does, None for any other node."""
    if node.op == "call_module":
        inner = called(module, node)
        return inner if isinstance(inner, ACTIVATIONS) and not hooked(inner) else None
    plain = len(node.args) == 1 and not set(node.kwargs) - {"inplace"}
    known = ACTIVATION_FUNCTIONS if node.op == "call_function" else ACTIVATION_METHODS
    return known[node.target]() if plain and node.target in known else None


def partner_in_sum(wiring: Wiring, nodes: list[str], norm: str | None) -> str | None:
    """The node that is added to a convolution's output behind its norm, but for what is silent in evaluation."""
    if len(nodes) != 1:
        return None
    node, awaited = wiring.nodes[nodes[0]], norm
    while (user := only_user(node)) is not None:
        if awaited is None and (summand := _summand(user, node)) is not None:
            return _source(wiring, summand).name
        if awaited is not None and user.target == awaited:
            inner = called(wiring.module, user)
            if not all(isinstance(c, nn.Identity) for c in inner.children()):
                return None
            awaited = None
        elif not is_silent(wiring.module, user):
            return None
        node = user
    return None


def adds(node: fx.Node) -> bool:
    """Whether the node is a sum."""
    return node.target in (SUMS if node.op == "call_function" else SUM_METHODS if node.op == "call_method" else ())


def multiplies(node: fx.Node) -> bool:
    """Whether the node is a product of two values."""
    known = PRODUCTS if node.op == "call_function" else PRODUCT_METHODS if node.op == "call_method" else ()
    return node.target in known and len(node.all_input_nodes) == 2


def _summand(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """What `user` adds to `node`, if that is what it does."""
    others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
    return others[0] if adds(user) and len(others) == 1 and not user.kwargs else None


def _source(wiring: Wiring, node: fx.Node) -> fx.Node:
    """The node itself, or what it hands on unchanged in evaluation."""
    while is_silent(wiring.module, node):
        node = node.all_input_nodes[0]
    return node


def is_silent(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node hands its input on unchanged in evaluation."""
    if node.op == "call_module":
        return isinstance(called(module, node), SILENT_MODULES)
    return node.op == "call_function" and node.target in SILENT_FUNCTIONS


def hooked(inner: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(inner._forward_hooks or inner._forward_pre_hooks)


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None
