"""Channel order: who behind a convolution can take up a permutation of its channels, and the taking up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropBlock2d, DropPath
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ghostify.ghost import GhostModule
from ghostify.tracing.kinds import is_plain
from ghostify.tracing.program import called
from ghostify.tracing.views import marks_of
from ghostify.tracing.wiring import NORMS, Wiring, hooked, only_user

BLIND_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh,
    nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Softplus, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, DropPath, DropBlock2d,
)  # fmt: skip
BLIND_FUNCTIONS = (
    F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.hardtanh, F.leaky_relu, F.elu, F.mish, F.softplus,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.dropout, F.dropout2d, F.interpolate,
    torch.relu, torch.relu_, torch.sigmoid, torch.tanh,
)  # fmt: skip
BLIND_METHODS = ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "contiguous", "clone", "detach", "float", "half")


@dataclass(frozen=True)
class Absorption:
    """A straight line behind a convolution: the norms on it, and the dense convolution at its end."""

    norms: tuple[str, ...]
    consumer: str


def absorption(wiring: Wiring, nodes: list[str]) -> Absorption | None:
    """Follow a convolution's output to one dense convolution through what treats every channel alike, or give up."""
    if len(nodes) != 1:
        return None
    norms: list[str] = []
    node = wiring.nodes[nodes[0]]
    while (user := only_reader(node)) is not None:
        inner: Any = called(wiring.module, user) if user.op == "call_module" else None
        if isinstance(inner, nn.Conv2d):
            dense = is_plain(inner) and inner.groups == 1 and wiring.used_once(user) and not hooked(inner)
            return Absorption(tuple(norms), str(user.target)) if dense else None
        if isinstance(inner, NORMS) and wiring.used_once(user) and not hooked(inner):
            if not blind_inside(inner):
                return None
            norms.append(str(user.target))
        elif not is_blind(wiring.module, user):
            return None
        node = user
    return None


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one, as its first argument, where no method ends."""
    user = None if marks_of(node) else only_user(node)
    return user if user is not None and user.args and user.args[0] is node else None


@torch.no_grad()
def absorb(module: nn.Module, ghost: GhostModule, target: Absorption) -> None:
    """Drop `ghost`'s gather: permute the norms behind it and the inputs of the consuming convolution instead."""
    assert ghost.order is not None
    concatenated = torch.argsort(ghost.order)
    for name in target.norms:
        permute_outputs(module.get_submodule(name), concatenated)
    consumer = module.get_submodule(target.consumer)
    permute_inputs(consumer.primary_conv if isinstance(consumer, GhostModule) else consumer, concatenated)
    ghost.order = None


@torch.no_grad()
def permute_outputs(inner: nn.Module, order: Tensor) -> None:
    """Make a convolution or a norm put out its channels in this order."""
    for tensor in (*inner.parameters(recurse=False), *inner.buffers(recurse=False)):
        if tensor.dim():
            tensor.copy_(tensor[order.to(tensor.device)])


@torch.no_grad()
def permute_inputs(inner: nn.Module, order: Tensor, spread: int = 1) -> None:
    """Make a convolution or linear layer read channels in this order, each `spread` columns wide."""
    weight: Any = inner.weight
    order = order.to(weight.device)
    weight.copy_(weight[:, (order[:, None] * spread + torch.arange(spread, device=order.device)).flatten()])


def is_blind(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node of the module's graph treats every channel alike, and no hook looks on."""
    if node.op != "call_module":
        return is_blind_call(node)
    inner = called(module, node)
    return isinstance(inner, BLIND_MODULES) and not hooked(inner)


def is_blind_call(node: fx.Node) -> bool:
    """Whether a function or method is called that treats every channel alike."""
    known = {"call_function": BLIND_FUNCTIONS, "call_method": BLIND_METHODS}
    return node.target in known.get(node.op, ())


def blind_inside(norm: nn.Module) -> bool:
    """Whether what a norm holds, such as its activation, treats every channel alike, and no hook looks on."""
    return all(isinstance(child, BLIND_MODULES) and not hooked(child) for child in norm.children())
