"""Channel order: who behind a convolution can take up a permutation of its channels, and the taking up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.ghost import GhostModule
from ghostify.graph.batchnorm import BatchNorm
from ghostify.graph.op_queries import is_channel_independent, is_channel_independent_module, is_standard_conv
from ghostify.modules.hooks import has_hooks
from ghostify.tracing.program import called
from ghostify.tracing.views import marks_of
from ghostify.tracing.wiring import Wiring, only_user


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
            dense = is_standard_conv(inner) and inner.groups == 1 and wiring.used_once(user) and not has_hooks(inner)
            return Absorption(tuple(norms), str(user.target)) if dense else None
        if isinstance(inner, BatchNorm) and wiring.used_once(user) and not has_hooks(inner):
            if not blind_inside(inner):
                return None
            norms.append(str(user.target))
        elif not is_channel_independent(wiring.module, user):
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


def blind_inside(norm: nn.Module) -> bool:
    """Whether what a norm holds, such as its activation, treats every channel alike, and no hook looks on."""
    return all(map(is_channel_independent_module, norm.children()))
