"""The inference graph: guards and training flags removed, norms folded, ghost modules split; in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ghostify.graph.batchnorm import BatchNorm, batchnorm_affine, batchnorm_at, inner_modules
from ghostify.graph.conv_types import to_standard_conv
from ghostify.graph.methods import MARKS
from ghostify.graph.neighbours import GraphIndex, following_norm, only_user
from ghostify.graph.op_queries import activation_module, is_channel_independent, is_identity_in_eval, is_standard_conv
from ghostify.graph.paths import called_module
from ghostify.graph.symbolic_tracer import TrainingFlag, is_guard
from ghostify.modules.ghost import CheapOperation, GhostModule
from ghostify.modules.hooks import has_hooks
from ghostify.rewriting.activation_chain import without_inplace

MIN_RELATIVE_SCALE = 1e-6


def freeze_eval(module: fx.GraphModule) -> None:
    """Fix evaluation mode in a graph, in place: training flags are False, guards and identities in evaluation gone."""
    flags: set[fx.Node] = set()
    for node in list(module.graph.nodes):
        node.meta.pop(MARKS, None)
        if node.op == "call_module" and isinstance(called_module(module, node), TrainingFlag):
            flags.add(node)
    for node in flags:
        for user in list(node.users):
            user.args = fx.node.map_arg(user.args, lambda n: False if n in flags else n)
            user.kwargs = fx.node.map_arg(user.kwargs, lambda n: False if n in flags else n)
        module.graph.erase_node(node)
    for node in list(module.graph.nodes):
        if is_guard(node):
            module.graph.erase_node(node)
        elif node.op == "call_method" and node.target == "view":
            node.target = "reshape"  # which accepts channels-last tensors as well
        elif is_identity_in_eval(module, node) and isinstance(operand := _first_operand(node), fx.Node):
            node.replace_all_uses_with(operand)
            module.graph.erase_node(node)


def _first_operand(node: fx.Node) -> Any:
    return next(iter((*node.args, *node.kwargs.values())), None)


def fold_norms(module: fx.GraphModule, dense: set[str]) -> dict[fx.Node, Tensor]:
    """Fold norms into the convolutions before them, and split ghost modules into convolutions and concatenation.

    Returns the concatenations whose channels are not in the original order, with the original index of each channel.
    Ghost modules with paths in `dense`, whose ghosts are pixelwise combinations of all intrinsic maps, become two
    convolutions without a concatenation.
    """
    index = GraphIndex(module)
    orders: dict[fx.Node, Tensor] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_module":
            continue
        called = called_module(module, node)
        if isinstance(called, nn.Conv2d) and not has_hooks(called):
            _fold_conv(index, node, called)
        elif isinstance(called, GhostModule):
            orders |= _replace_ghost(index, node, called, dense=str(node.target) in dense)
    module.delete_all_unused_submodules()
    return orders


def can_be_dense(module: nn.Module) -> TypeGuard[GhostModule]:
    """Whether a module is a ghost module whose ghosts are pixelwise combinations of all intrinsic maps."""
    if not isinstance(module, GhostModule) or module.activation is not None:
        return False
    layout = module.layout
    return layout is not None and layout.is_low_rank


@dataclass(frozen=True, eq=False)
class _Affine:
    """The scale and shift per channel (n) that a norm applies in evaluation."""

    scale: Tensor
    shift: Tensor


def _fold_conv(index: GraphIndex, node: fx.Node, conv: nn.Conv2d) -> None:
    module = index.module
    norm_path = following_norm(index, [node.name])
    if norm_path is None or not index.is_called_once(node) or index.is_read(conv):
        return
    standard_conv = conv if is_standard_conv(conv) else to_standard_conv(conv)
    if isinstance(standard_conv, str):
        return
    norm: Any = batchnorm_at(module, norm_path)
    weight, bias = fuse_conv_bn_weights(
        standard_conv.weight, standard_conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    standard_conv.weight, standard_conv.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    module.set_submodule(str(node.target), standard_conv)
    _remove_norm(module, node, norm_path)


def _remove_norm(module: fx.GraphModule, node: fx.Node, norm_path: str) -> None:
    """Remove the call of a folded norm that follows `node`; an activation that is part of the norm stays."""
    norm_node = only_user(node)
    assert norm_node is not None
    norm = module.get_submodule(norm_path)
    last = node
    with module.graph.inserting_after(norm_node):
        for name in inner_modules(norm):
            last = module.graph.call_module(f"{norm_path}.{name}", (last,))
    norm_node.replace_all_uses_with(last, delete_user_cb=lambda user: user is not last)
    module.graph.erase_node(norm_node)


@torch.no_grad()
def _replace_ghost(index: GraphIndex, node: fx.Node, ghost: GhostModule, dense: bool) -> dict[fx.Node, Tensor]:
    """Replace a ghost module by its convolutions; returns the concatenation and its channel order as `fold_norms`."""
    module, path = index.module, str(node.target)
    if not index.is_called_once(node):
        return {}
    norm_path = following_norm(index, [node.name])
    norm, order, shift = batchnorm_at(module, norm_path), _channel_order(ghost), None
    if ghost.activation is not None and not _has_same_norm(ghost, norm, order):
        return {}
    if norm is not None and norm_path is not None:
        shift = _fold_into_ghost(ghost, _affine(norm, order))
        _remove_norm(module, node, norm_path)
    if dense:
        _merge_pointwise(ghost, order)
    output = _insert_dense(module, node, path) if dense else _insert_split(module, node, path, ghost, shift)
    node.replace_all_uses_with(output)
    module.graph.erase_node(node)
    _keep_children_only(module, path, ghost)
    return {} if dense or torch.equal(order, torch.arange(len(order))) else {output: order}


def _insert_dense(module: fx.GraphModule, node: fx.Node, path: str) -> fx.Node:
    with module.graph.inserting_before(node):
        intrinsic = module.graph.call_module(f"{path}.primary_conv", node.args)
        return module.graph.call_module(f"{path}.cheap_operation", (intrinsic,))


def _insert_split(
    module: fx.GraphModule, node: fx.Node, path: str, ghost: GhostModule, shift: Tensor | None
) -> fx.Node:
    """Call a ghost module's convolutions and concatenate; a following activation moves before the concatenation."""
    graph = module.graph
    with graph.inserting_before(node):
        intrinsic = graph.call_module(f"{path}.primary_conv", node.args)
        activated = intrinsic if ghost.activation is None else graph.call_module(f"{path}.activation", (intrinsic,))
        maps = [intrinsic, *_cheap_calls(module, path, ghost, activated)]
        if shift is not None:
            ghost.register_buffer("shift", shift[:, None, None].clone())
            maps[0] = graph.call_function(torch.add, (intrinsic, graph.get_attr(f"{path}.shift")))
        user = only_user(node)
        movable = user is not None and is_channel_independent(module, user)
        activation = activation_module(module, user) if user is not None and movable else None
        if activation is not None:
            maps = [_call_activation(module, path, activation, m) for m in maps]
        concatenation = graph.call_function(torch.cat, (maps, 1))
    if activation is not None and user is not None:
        user.replace_all_uses_with(node)
        graph.erase_node(user)
    return concatenation


def _keep_children_only(module: fx.GraphModule, path: str, ghost: GhostModule) -> None:
    """Replace a ghost module by a plain module with its submodules and buffers."""
    container = nn.Module()
    ghost.order = None
    container._modules, container._buffers = ghost._modules, {k: v for k, v in ghost._buffers.items() if v is not None}
    module.set_submodule(path, container)


def _channel_order(ghost: GhostModule) -> Tensor:
    """The output channel of each map, in the order in which the maps are computed."""
    outputs = ghost.primary_conv.out_channels + sum(conv.out_channels for conv in ghost.cheap_convs)
    return torch.arange(outputs) if ghost.order is None else torch.argsort(ghost.order).cpu()


def _call_activation(module: fx.GraphModule, path: str, activation: nn.Module, source: fx.Node) -> fx.Node:
    """A call of a copy of the activation that does not write into its input."""
    name = f"{path}.after"
    if "after" not in module.get_submodule(path)._modules:
        module.get_submodule(path).add_module("after", without_inplace(activation))
    return module.graph.call_module(name, (source,))


def _cheap_calls(module: fx.GraphModule, path: str, ghost: GhostModule, source: fx.Node) -> list[fx.Node]:
    cheap = ghost.cheap_operation
    if not isinstance(cheap, CheapOperation):
        return [module.graph.call_module(f"{path}.cheap_operation", (source,))]
    calls = []
    for k, (start, stop) in enumerate(ghost.cheap_ranges):
        maps = module.graph.call_function(torch.narrow, (source, 1, start, stop - start))
        calls.append(module.graph.call_module(f"{path}.cheap_operation.convs.{k}", (maps,)))
    return calls


def _affine(norm: BatchNorm, order: Tensor) -> _Affine:
    """A norm's scale and shift, in the order in which the ghost module computes the channels."""
    scale, shift = batchnorm_affine(norm)
    order = order.to(scale.device)
    return _Affine(scale[order], shift[order])


def _fold_into_ghost(ghost: GhostModule, affine: _Affine) -> Tensor | None:
    """Fold a norm into both convolutions; returns the shift (m) still to be added to the intrinsic maps, None if none.

    The cheap operation reads the scaled intrinsic maps without the norm's shift, which its padding would not share.
    With 1 x 1 kernels there is no padding, and its bias subtracts the shift; activated ghosts read the shifted maps.
    """
    m = ghost.primary_conv.out_channels
    scale, shift, zeros = affine.scale[:m], affine.shift[:m], torch.zeros_like(affine.shift[:m])
    if ghost.activation is not None:
        _scale_primary(ghost, scale, shift)
        _scale_cheap(ghost, torch.ones_like(scale), zeros, affine)
        ghost.activation = nn.Sequential(*[c for c in ghost.activation.children() if not isinstance(c, BatchNorm)])
        return None
    min_scale = MIN_RELATIVE_SCALE * scale.abs().max().clamp_min(1e-30)
    scale = torch.where(scale.abs() < min_scale, min_scale, scale)
    if all(conv.kernel_size == (1, 1) for conv in ghost.cheap_convs):
        _scale_primary(ghost, scale, shift)
        _scale_cheap(ghost, scale, shift, affine)
        return None
    _scale_primary(ghost, scale, zeros)
    _scale_cheap(ghost, scale, zeros, affine)
    return shift.to(ghost.primary_conv.weight.dtype) if shift.any() else None


def _scale_primary(ghost: GhostModule, scale: Tensor, shift: Tensor) -> None:
    conv = ghost.primary_conv
    bias = shift if conv.bias is None else conv.bias.double() * scale + shift
    conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])
    if bias.any():
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype))


def _scale_cheap(ghost: GhostModule, scale: Tensor, shift: Tensor, affine: _Affine) -> None:
    """Adapt the cheap convolutions to intrinsic maps with `scale` and `shift`, and apply `affine` to their outputs."""
    start_out = ghost.primary_conv.out_channels
    for conv, (start_in, _) in zip(ghost.cheap_convs, ghost.cheap_ranges, strict=True):
        outputs, width = conv.out_channels, conv.in_channels // conv.groups
        group = torch.arange(outputs, device=scale.device) // (outputs // conv.groups)
        source = start_in + group[:, None] * width + torch.arange(width, device=scale.device)
        ghost_scale = affine.scale[start_out : start_out + outputs]
        kernels = conv.weight.double() * (ghost_scale[:, None] / scale[source])[:, :, None, None]
        bias = affine.shift[start_out : start_out + outputs] - (kernels.sum((2, 3)) * shift[source]).sum(1)
        if conv.bias is not None:
            bias = bias + conv.bias.double() * ghost_scale
        conv.weight.copy_(kernels)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype))
        start_out += outputs


def _merge_pointwise(ghost: GhostModule, order: Tensor) -> None:
    """Replace the cheap operation by a dense 1 x 1 convolution that computes all maps, in the original order."""
    cheap, m = ghost.cheap_operation, ghost.primary_conv.out_channels
    assert isinstance(cheap, nn.Conv2d)
    dense = nn.Conv2d(m, len(order), 1, bias=cheap.bias is not None, device="meta")
    positions = torch.argsort(order).to(cheap.weight.device)
    identity = torch.eye(m, dtype=cheap.weight.dtype, device=cheap.weight.device)[:, :, None, None]
    dense.weight = nn.Parameter(torch.cat((identity, cheap.weight))[positions])
    if cheap.bias is not None:
        dense.bias = nn.Parameter(F.pad(cheap.bias, (m, 0))[positions])
    ghost.cheap_operation = dense


def _has_same_norm(ghost: GhostModule, norm: BatchNorm | None, order: Tensor) -> bool:
    """Whether the cheap operation's input passes the norm that follows the ghost module, or neither has a norm."""
    assert ghost.activation is not None
    norms = [c for c in ghost.activation.modules() if isinstance(c, BatchNorm)]
    if norm is None or len(norms) != 1 or inner_modules(norms[0]):
        return norm is None and not norms
    m = ghost.primary_conv.out_channels
    inner, following = _affine(norms[0], torch.arange(m)), _affine(norm, order)
    return torch.allclose(inner.scale, following.scale[:m]) and torch.allclose(inner.shift, following.shift[:m])
