"""Applies a plan and its fits; decides nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.graph.batchnorm import BatchNorm, batchnorm_at
from ghostify.graph.program import Program, conv_module, get_subgraph, set_subgraph
from ghostify.modules.ghost import GhostModule, GhostWeights, build_ghost_module
from ghostify.planning.planner import GhostRewrite, Plan, PruneRewrite
from ghostify.pruning.kept_channels import KeptChannels, prune_channels
from ghostify.pruning.permutation_target import push_permutation
from ghostify.pruning.slicing import PrunedConvWeights, slice_conv
from ghostify.rewriting.activation_chain import copy_activation_chain, slice_chain

FittedWeights = GhostWeights | PrunedConvWeights


def rewrite(program: Program, plan: Plan, weights: Mapping[str, FittedWeights]) -> nn.Module:
    """A copy of the program's module in which every rewrite of `plan` is a `GhostModule` with its fitted weights, and
    what is to be narrow has fewer maps; of those without weights what is left of their own."""
    module = copy.deepcopy(program.module)
    for path in program.subgraphs:
        rewrite_part(module, path, plan, weights)
    return module


def rewrite_part(module: nn.Module, path: str, plan: Plan, weights: Mapping[str, FittedWeights]) -> None:
    """Rewrite one part of a copy of the program's module, in place."""
    changes = [e for e in plan.changes if e.conv.subgraph_path == path]
    if not changes:
        return
    part = get_subgraph(module, path)
    for change in changes:
        insert_pruned(part, change)
    for change in changes:
        if change.conv.name in weights or isinstance(change, GhostRewrite):
            insert_fitted(part, change, weights[change.conv.name])
    for entry in (e for e in changes if isinstance(e, GhostRewrite)):
        ghost = part.get_submodule(ghost_path(entry))
        assert isinstance(ghost, GhostModule)
        if entry.permutation_target is not None and ghost.order is not None:
            push_permutation(part, ghost, entry.permutation_target)
    part.graph.lint()
    part.recompile()
    set_subgraph(module, path, part)


def ghost_path(entry: GhostRewrite) -> str:
    """Path of the ghost module in its part: the convolution's own, or beside the weight of a functional one."""
    return f"{entry.conv.local_path}_ghost" if entry.conv.is_functional else entry.conv.local_path


def insert_fitted(module: fx.GraphModule, entry: GhostRewrite | PruneRewrite, weights: FittedWeights) -> None:
    """Put what was fitted into a part, in place: a ghost module, or the weights of what is narrow there already."""
    if isinstance(entry, GhostRewrite):
        assert isinstance(weights, GhostWeights)
        insert_ghost(module, entry, weights)
    else:
        assert isinstance(weights, PrunedConvWeights)
        _put_dense(module, entry, weights)


def insert_pruned(module: fx.GraphModule, entry: GhostRewrite | PruneRewrite) -> None:
    """Leave out the channels that `entry` has its convolution, and the tensors named beside it, lose, in place; what is
    left keeps its weights."""
    if entry.kept_channels is None:
        return
    conv: Any = module.get_submodule(entry.conv.local_path)
    module.set_submodule(
        entry.conv.local_path, slice_conv(conv, entry.kept_channels.kept_out, entry.kept_channels.kept_in)
    )
    prune_channels(module, {path: KeptChannels(kept) for path, kept in entry.kept_channels.tensors})


@torch.no_grad()
def _put_dense(module: fx.GraphModule, entry: PruneRewrite, weights: PrunedConvWeights) -> None:
    conv: Any = module.get_submodule(entry.conv.local_path)
    conv.weight.copy_(weights.weight)
    if weights.bias is not None:
        conv.bias.copy_(weights.bias)
    if weights.shift is not None:
        _shift_running_mean(batchnorm_at(module, entry.norm), weights.shift)


def _shift_running_mean(norm: BatchNorm | None, shift: Tensor) -> None:
    """Let a norm hold constants that what it reads lacks."""
    assert norm is not None
    assert norm.running_mean is not None
    with torch.no_grad():
        norm.running_mean.sub_(shift.to(norm.running_mean))


def insert_ghost(module: fx.GraphModule, entry: GhostRewrite, weights: GhostWeights) -> None:
    """Put the ghost module of `entry` into its part, `module`, in place; its channel order is that of the original.

    Where it stands already, it takes the new weights.
    """
    place, _, leaf = ghost_path(entry).rpartition(".")
    owner = module.get_submodule(place)
    standing = getattr(owner, leaf, None)
    if isinstance(standing, GhostModule):
        _load_ghost_weights(standing, weights)
        return
    ghost = build_ghost_module(conv_module(module, entry.conv.local_path), entry.layout)
    _load_ghost_weights(ghost, weights)
    ghost.recompute = entry.norm is not None
    if entry.conv.is_functional:
        _replace_functional_calls(module, entry)
    setattr(owner, leaf, ghost)
    if entry.norm is not None and weights.norm_shift is not None:
        _shift_running_mean(batchnorm_at(module, entry.norm), weights.norm_shift)
    if weights.activated:
        ghost.activation = slice_chain(copy_activation_chain(module, entry), weights.channels[: entry.layout.intrinsic])


@torch.no_grad()
def _load_ghost_weights(ghost: GhostModule, weights: GhostWeights) -> None:
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


def _replace_functional_calls(module: fx.GraphModule, entry: GhostRewrite) -> None:
    """Turn the calls of a functional convolution into calls of the ghost module; parameters nobody reads then go."""
    names = {call.node for call in entry.conv.calls}
    fetched: set[str] = set()
    for node in [n for n in module.graph.nodes if n.name in names]:
        fetched |= {str(n.target) for n in node.all_input_nodes[1:]}
        image = node.args[0] if node.args else node.kwargs["input"]
        node.op, node.target, node.args, node.kwargs = "call_module", ghost_path(entry), (image,), {}
    for node in [n for n in module.graph.nodes if n.op == "get_attr" and n.target in fetched]:
        if not node.users:
            module.graph.erase_node(node)
    for path in fetched - {n.target for n in module.graph.nodes if n.op == "get_attr"}:
        owner, _, leaf = path.rpartition(".")
        delattr(module.get_submodule(owner), leaf)
