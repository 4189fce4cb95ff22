"""Applies a plan and its fits; decides nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.graph.batchnorm import BatchNorm, batchnorm_at
from ghostify.graph.program import Program, as_module, part_of, put_part
from ghostify.modules.ghost import GhostModule, GhostWeights, ghost_of
from ghostify.planning.planner import Narrow, Plan, Rewrite
from ghostify.pruning.kept_channels import KeptChannels, prune_channels
from ghostify.pruning.permutation_target import absorb
from ghostify.pruning.slicing import DenseWeights, narrowed_conv
from ghostify.rewriting.activation_chain import activation_line, narrowed

Weights = GhostWeights | DenseWeights


def rewrite(program: Program, plan: Plan, weights: Mapping[str, Weights]) -> nn.Module:
    """A copy of the program's module in which every rewrite of `plan` is a `GhostModule` with its fitted weights, and
    what is to be narrow has fewer maps; of those without weights what is left of their own."""
    module = copy.deepcopy(program.module)
    for path in program.parts:
        rewrite_part(module, path, plan, weights)
    return module


def rewrite_part(module: nn.Module, path: str, plan: Plan, weights: Mapping[str, Weights]) -> None:
    """Rewrite one part of a copy of the program's module, in place."""
    changes = [e for e in plan.changes if e.conv.part == path]
    if not changes:
        return
    part = part_of(module, path)
    for change in changes:
        put_narrow(part, change)
    for change in changes:
        if change.conv.name in weights or isinstance(change, Rewrite):
            put(part, change, weights[change.conv.name])
    for entry in (e for e in changes if isinstance(e, Rewrite)):
        ghost = part.get_submodule(place_of(entry))
        assert isinstance(ghost, GhostModule)
        if entry.absorb is not None and ghost.order is not None:
            absorb(part, ghost, entry.absorb)
    part.graph.lint()
    part.recompile()
    put_part(module, path, part)


def place_of(entry: Rewrite) -> str:
    """Path of the ghost module in its part: the convolution's own, or beside the weight of a functional one."""
    return entry.conv.local if entry.conv.kind != "conv2d" else f"{entry.conv.local}_ghost"


def put(module: fx.GraphModule, entry: Rewrite | Narrow, weights: Weights) -> None:
    """Put what was fitted into a part, in place: a ghost module, or the weights of what is narrow there already."""
    if isinstance(entry, Rewrite):
        assert isinstance(weights, GhostWeights)
        put_ghost(module, entry, weights)
    else:
        assert isinstance(weights, DenseWeights)
        _put_dense(module, entry, weights)


def put_narrow(module: fx.GraphModule, entry: Rewrite | Narrow) -> None:
    """Leave out the channels that `entry` has its convolution, and the tensors named beside it, lose, in place; what is
    left keeps its weights."""
    if entry.narrowing is None:
        return
    conv: Any = module.get_submodule(entry.conv.local)
    module.set_submodule(entry.conv.local, narrowed_conv(conv, entry.narrowing.kept_out, entry.narrowing.kept_in))
    prune_channels(module, {path: KeptChannels(kept) for path, kept in entry.narrowing.tensors})


@torch.no_grad()
def _put_dense(module: fx.GraphModule, entry: Narrow, weights: DenseWeights) -> None:
    conv: Any = module.get_submodule(entry.conv.local)
    conv.weight.copy_(weights.weight)
    if weights.bias is not None:
        conv.bias.copy_(weights.bias)
    if weights.shift is not None:
        _take_up(batchnorm_at(module, entry.norm), weights.shift)


def _take_up(norm: BatchNorm | None, shift: Tensor) -> None:
    """Let a norm hold constants that what it reads lacks."""
    assert norm is not None
    assert norm.running_mean is not None
    with torch.no_grad():
        norm.running_mean.sub_(shift.to(norm.running_mean))


def put_ghost(module: fx.GraphModule, entry: Rewrite, weights: GhostWeights) -> None:
    """Put the ghost module of `entry` into its part, `module`, in place; its channel order is that of the original.

    Where it stands already, it takes the new weights.
    """
    place, _, leaf = place_of(entry).rpartition(".")
    owner = module.get_submodule(place)
    standing = getattr(owner, leaf, None)
    if isinstance(standing, GhostModule):
        _fill(standing, weights)
        return
    ghost = ghost_of(as_module(module, entry.conv.local), entry.layout)
    _fill(ghost, weights)
    ghost.recompute = entry.norm is not None
    if entry.conv.kind == "conv2d":
        _call_instead(module, entry)
    setattr(owner, leaf, ghost)
    if entry.norm is not None and weights.shift is not None:
        _take_up(batchnorm_at(module, entry.norm), weights.shift)
    if weights.activated:
        ghost.activation = narrowed(activation_line(module, entry), weights.channels[: entry.layout.intrinsic])


@torch.no_grad()
def _fill(ghost: GhostModule, weights: GhostWeights) -> None:
    convs: tuple[Any, ...] = ghost.cheap_convs
    ghost.primary_conv.weight.copy_(weights.primary_weight)
    sizes = [conv.out_channels for conv in convs]
    for conv, kernels in zip(convs, weights.cheap_weight.split(sizes), strict=True):
        conv.weight.copy_(kernels)
    if ghost.primary_conv.bias is not None and weights.primary_bias is not None and weights.cheap_bias is not None:
        ghost.primary_conv.bias.copy_(weights.primary_bias)
        for conv, bias in zip(convs, weights.cheap_bias.split(sizes), strict=True):
            conv.bias.copy_(bias)
    order = torch.argsort(weights.channels)
    ordered = torch.equal(order, torch.arange(len(order)))
    ghost.order = None if ordered else order.to(ghost.primary_conv.weight.device)


def _call_instead(module: fx.GraphModule, entry: Rewrite) -> None:
    """Turn the calls of a functional convolution into calls of the ghost module; parameters nobody reads then go."""
    names = {call.node for call in entry.conv.calls}
    fetched: set[str] = set()
    for node in [n for n in module.graph.nodes if n.name in names]:
        fetched |= {str(n.target) for n in node.all_input_nodes[1:]}
        image = node.args[0] if node.args else node.kwargs["input"]
        node.op, node.target, node.args, node.kwargs = "call_module", place_of(entry), (image,), {}
    for node in [n for n in module.graph.nodes if n.op == "get_attr" and n.target in fetched]:
        if not node.users:
            module.graph.erase_node(node)
    for path in fetched - {n.target for n in module.graph.nodes if n.op == "get_attr"}:
        owner, _, leaf = path.rpartition(".")
        delattr(module.get_submodule(owner), leaf)
