"""Applies a plan and its fitted weights to a copy of the traced module; makes no decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.arguments import a_mapping, public
from ghostify.errors import GhostifyError
from ghostify.graph.batchnorm import BatchNorm, batchnorm_at
from ghostify.graph.model_copy import copy_module
from ghostify.graph.program import Program, a_program, conv_module, get_subgraph, set_subgraph
from ghostify.modules.ghost import GhostModule, GhostWeights, build_ghost_module
from ghostify.modules.layout import GhostLayout
from ghostify.planning.planner import GhostRewrite, Plan, PruneRewrite, a_plan, check_plan
from ghostify.pruning.kept_channels import KeptChannels, prune_channels, resize_divisions
from ghostify.pruning.permutation_target import push_permutation
from ghostify.pruning.slicing import PrunedConvWeights
from ghostify.rewriting.activation_chain import copy_activation_chain, slice_chain

FittedWeights = GhostWeights | PrunedConvWeights


@public(program=a_program, plan=a_plan, weights=a_mapping("Pass the weights of what fit() returns."))
def rewrite(program: Program, plan: Plan, weights: Mapping[str, FittedWeights]) -> nn.Module:
    """A copy of the program's module with a `GhostModule` for every ghost rewrite of `plan`, and with pruned channels.

    Pruned convolutions without fitted `weights` keep the original's weights of their kept channels. Raises
    `GhostifyError` for a plan of another program, and for weights that do not fit the plan.
    """
    check_plan(program, plan)
    _check_weights(plan, weights)
    module = copy_module(program.module)
    for path in program.subgraphs:
        rewrite_subgraph(module, path, plan, weights)
    return module


def _check_weights(plan: Plan, weights: Mapping[str, FittedWeights]) -> None:
    """Raises `GhostifyError` where a ghost rewrite has no weights, or weights of another layout."""
    for entry in plan.changes:
        fitted, name = weights.get(entry.conv.name), entry.conv.name
        if isinstance(entry, PruneRewrite):
            if not isinstance(fitted, PrunedConvWeights | None):
                raise GhostifyError(f"weights: those of {name} are ghost weights. Pass those of fit(program, plan).")
        elif not isinstance(fitted, GhostWeights):
            raise GhostifyError(f"weights: have no GhostWeights for {name}. Pass those of fit(program, plan).")
        elif not _fits(fitted, entry.layout):
            raise GhostifyError(f"weights: those of {name} are of another plan. Pass those of fit(program, plan).")


def _fits(weights: GhostWeights, layout: GhostLayout) -> bool:
    """Whether weights have the sizes of a layout."""
    cheap_shape = (layout.ghosts, *layout.kernel_shape)
    sizes = len(weights.channels), len(weights.primary_weight), tuple(weights.cheap_weight.shape)
    return sizes == (layout.outputs, layout.intrinsic, cheap_shape)


def rewrite_subgraph(module: nn.Module, path: str, plan: Plan, weights: Mapping[str, FittedWeights]) -> None:
    """Rewrite the subgraph at a path of a copy of the program's module, in place."""
    changes = [e for e in plan.changes if e.conv.subgraph_path == path]
    if not changes:
        return
    subgraph = get_subgraph(module, path)
    for change in changes:
        insert_pruned(subgraph, change)
    for change in changes:
        if change.conv.name in weights or isinstance(change, GhostRewrite):
            insert_fitted(subgraph, change, weights[change.conv.name])
    for entry in (e for e in changes if isinstance(e, GhostRewrite)):
        ghost = subgraph.get_submodule(ghost_path(entry))
        assert isinstance(ghost, GhostModule)
        if entry.permutation_target is not None and ghost.order is not None:
            push_permutation(subgraph, ghost, entry.permutation_target)
    subgraph.graph.lint()
    subgraph.recompile()
    set_subgraph(module, path, subgraph)


def ghost_path(entry: GhostRewrite) -> str:
    """Path of the ghost module in its subgraph: the convolution's, or for a function next to its weight."""
    return f"{entry.conv.local_path}_ghost" if entry.conv.is_functional else entry.conv.local_path


def insert_fitted(module: fx.GraphModule, entry: GhostRewrite | PruneRewrite, weights: FittedWeights) -> None:
    """Insert fitted weights into a subgraph, in place: as a ghost module, or into a convolution already pruned."""
    if isinstance(entry, GhostRewrite):
        assert isinstance(weights, GhostWeights)
        insert_ghost(module, entry, weights)
    else:
        assert isinstance(weights, PrunedConvWeights)
        _load_pruned_weights(module, entry, weights)


def insert_pruned(module: fx.GraphModule, entry: GhostRewrite | PruneRewrite) -> None:
    """Prune the layer of `entry`, and the tensors that its kept channels name, in place; the rest keeps its weights."""
    if entry.kept_channels is not None:
        tensors = {path: KeptChannels(kept) for path, kept in entry.kept_channels.tensors}
        prune_channels(module, {entry.conv.local_path: entry.kept_channels, **tensors})
        resize_divisions(module, dict(entry.kept_channels.parts))


@torch.no_grad()
def _load_pruned_weights(module: fx.GraphModule, entry: PruneRewrite, weights: PrunedConvWeights) -> None:
    conv: Any = module.get_submodule(entry.conv.local_path)
    conv.weight.copy_(weights.weight.reshape(conv.weight.shape))
    if weights.bias is not None:
        conv.bias.copy_(weights.bias)
    if weights.shift is not None:
        _shift_running_mean(batchnorm_at(module, entry.norm), weights.shift)


def _shift_running_mean(norm: BatchNorm | None, shift: Tensor) -> None:
    """Add constants to the channels of a norm's input, by its running mean."""
    assert norm is not None
    assert norm.running_mean is not None
    with torch.no_grad():
        norm.running_mean.sub_(shift.to(norm.running_mean))


def insert_ghost(module: fx.GraphModule, entry: GhostRewrite, weights: GhostWeights) -> None:
    """Insert the ghost module of `entry` into its subgraph, in place; its channel order is that of the original.

    A ghost module that is there already gets the new weights.
    """
    parent_path, _, name = ghost_path(entry).rpartition(".")
    parent = module.get_submodule(parent_path)
    existing = getattr(parent, name, None)
    if isinstance(existing, GhostModule):
        _load_ghost_weights(existing, weights)
        return
    ghost = build_ghost_module(conv_module(module, entry.conv.local_path), entry.layout)
    _load_ghost_weights(ghost, weights)
    ghost.recompute = entry.norm is not None
    if entry.conv.is_functional:
        _replace_functional_calls(module, entry)
    setattr(parent, name, ghost)
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
    is_identity = torch.equal(order, torch.arange(len(order)))
    ghost.order = None if is_identity else order.to(ghost.primary_conv.weight.device)


def _replace_functional_calls(module: fx.GraphModule, entry: GhostRewrite) -> None:
    """Replace the calls of a functional convolution by calls of the ghost module; delete unused parameters."""
    names = {call.node for call in entry.conv.calls}
    parameter_paths: set[str] = set()
    for node in [n for n in module.graph.nodes if n.name in names]:
        parameter_paths |= {str(n.target) for n in node.all_input_nodes[1:]}
        image = node.args[0] if node.args else node.kwargs["input"]
        node.op, node.target, node.args, node.kwargs = "call_module", ghost_path(entry), (image,), {}
    for node in [n for n in module.graph.nodes if n.op == "get_attr" and n.target in parameter_paths]:
        if not node.users:
            module.graph.erase_node(node)
    for path in parameter_paths - {n.target for n in module.graph.nodes if n.op == "get_attr"}:
        parent_path, _, name = path.rpartition(".")
        delattr(module.get_submodule(parent_path), name)
