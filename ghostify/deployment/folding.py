"""The inference graph: guards and modes gone, norms folded into convolutions, ghost modules taken apart; in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ghostify.graph.batchnorm import BatchNorm, batchnorm_affine, batchnorm_at, inner_modules
from ghostify.graph.conv_types import to_standard_conv
from ghostify.graph.methods import MARKS
from ghostify.graph.neighbours import GraphIndex, following_norm, only_user
from ghostify.graph.op_queries import activation_module, is_channel_independent, is_identity_in_eval, is_standard_conv
from ghostify.graph.program import called_module
from ghostify.graph.symbolic_tracer import TrainingFlag, is_guard
from ghostify.modules.ghost import CheapOperation, GhostModule
from ghostify.modules.hooks import has_hooks
from ghostify.rewriting.activation_chain import without_inplace

ORDER = "ghostify_order"  # in a node's meta: which original channel each of its channels is
FLOOR = 1e-6


def freeze_eval(module: fx.GraphModule) -> None:
    """Evaluation mode for good: modes are False, what is silent then goes, and so do guards over arguments."""
    modes: set[fx.Node] = set()
    for node in list(module.graph.nodes):
        node.meta.pop(MARKS, None)
        if node.op == "call_module" and isinstance(called_module(module, node), TrainingFlag):
            modes.add(node)
    for node in modes:
        for user in list(node.users):
            user.args = fx.node.map_arg(user.args, lambda n: False if n in modes else n)
            user.kwargs = fx.node.map_arg(user.kwargs, lambda n: False if n in modes else n)
        module.graph.erase_node(node)
    for node in list(module.graph.nodes):
        if is_guard(node):
            module.graph.erase_node(node)
        elif node.op == "call_method" and node.target == "view":
            node.target = "reshape"  # which maps with channels last allow as well
        elif is_identity_in_eval(module, node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)


def fold_norms(module: fx.GraphModule, dense: set[str]) -> None:
    """Fold norms into the convolutions before them, and take ghost modules apart into convolutions and concatenation.

    What a ghost module made in an order of its own is noted under `ORDER` with the node that makes it. Ghost modules
    named in `dense`, of one pixel and of all intrinsic maps, become one more dense convolution instead.
    """
    wiring = GraphIndex(module)
    for node in list(module.graph.nodes):
        if node.op != "call_module":
            continue
        inner = called_module(module, node)
        if isinstance(inner, nn.Conv2d) and not has_hooks(inner):
            _fold_conv(wiring, node, inner)
        elif isinstance(inner, GhostModule):
            _split_ghost(wiring, node, inner, dense=str(node.target) in dense)
    module.delete_all_unused_submodules()


def can_be_dense(module: nn.Module) -> bool:
    """Whether it is a ghost module whose ghosts are one-pixel combinations of all intrinsic maps."""
    if not isinstance(module, GhostModule) or module.activation is not None:
        return False
    layout = module.layout
    return layout is not None and layout.is_low_rank


@dataclass(frozen=True, eq=False)
class _Affine:
    """What evaluation makes of a norm: scale and shift of each channel (n)."""

    scale: Tensor
    shift: Tensor


def _fold_conv(wiring: GraphIndex, node: fx.Node, conv: nn.Conv2d) -> None:
    module = wiring.module
    norm_path = following_norm(wiring, [node.name])
    if norm_path is None or not wiring.is_called_once(node):
        return
    made = conv if is_standard_conv(conv) else to_standard_conv(conv)
    if isinstance(made, str):
        return
    norm: Any = batchnorm_at(module, norm_path)
    weight, bias = fuse_conv_bn_weights(
        made.weight, made.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    made.weight, made.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    module.set_submodule(str(node.target), made)
    _without_norm(module, node, norm_path)


def _without_norm(module: fx.GraphModule, node: fx.Node, norm_path: str) -> None:
    """Take a norm that was folded out of the graph; the activation that it may hold stays."""
    reader = only_user(node)
    assert reader is not None
    norm = module.get_submodule(norm_path)
    last = node
    with module.graph.inserting_after(reader):
        for name in inner_modules(norm):
            last = module.graph.call_module(f"{norm_path}.{name}", (last,))
    reader.replace_all_uses_with(last, delete_user_cb=lambda user: user is not last)
    module.graph.erase_node(reader)


@torch.no_grad()
def _split_ghost(wiring: GraphIndex, node: fx.Node, ghost: GhostModule, dense: bool) -> None:
    """Convolutions and concatenation in the place of a ghost module, activated each where all of it was."""
    module, path = wiring.module, str(node.target)
    graph = module.graph
    if not wiring.is_called_once(node):
        return
    norm_path = following_norm(wiring, [node.name])
    norm, order, shift = batchnorm_at(module, norm_path), _order_of(ghost), None
    if ghost.activation is not None and not _same_norm(ghost, norm, order):
        return
    if norm is not None and norm_path is not None:
        shift = _fold_ghost(ghost, _affine(norm, order))
        _without_norm(module, node, norm_path)
    with graph.inserting_before(node):
        intrinsic = graph.call_module(f"{path}.primary_conv", node.args)
        if dense:
            _merge_pointwise(ghost, order)
            node.replace_all_uses_with(graph.call_module(f"{path}.cheap_operation", (intrinsic,)))
            graph.erase_node(node)
            _keep_children_only(module, path, ghost)
            return
        read = intrinsic if ghost.activation is None else graph.call_module(f"{path}.activation", (intrinsic,))
        maps = [intrinsic, *_ghosts(module, path, ghost, read)]
        if shift is not None:
            ghost.register_buffer("shift", shift[:, None, None].clone())
            maps[0] = graph.call_function(torch.add, (intrinsic, graph.get_attr(f"{path}.shift")))
        activation = only_user(node)
        alike = activation is not None and is_channel_independent(module, activation)
        act = activation_module(module, activation) if activation is not None and alike else None
        if act is not None:
            maps = [_activate(module, path, act, m) for m in maps]
        joined = graph.call_function(torch.cat, (maps, 1))
    if act is not None and activation is not None:
        activation.replace_all_uses_with(node)
        graph.erase_node(activation)
    if not torch.equal(order, torch.arange(len(order))):
        joined.meta[ORDER] = order
    node.replace_all_uses_with(joined)
    graph.erase_node(node)
    _keep_children_only(module, path, ghost)


def _keep_children_only(module: fx.GraphModule, path: str, ghost: GhostModule) -> None:
    """Leave of a ghost module what it holds."""
    shell = nn.Module()
    ghost.order = None
    shell._modules, shell._buffers = ghost._modules, {k: v for k, v in ghost._buffers.items() if v is not None}
    module.set_submodule(path, shell)


def _order_of(ghost: GhostModule) -> Tensor:
    """Which of the channels behind it each map is, in the order in which they are computed."""
    outputs = ghost.primary_conv.out_channels + sum(conv.out_channels for conv in ghost.cheap_convs)
    return torch.arange(outputs) if ghost.order is None else torch.argsort(ghost.order).cpu()


def _activate(module: fx.GraphModule, path: str, act: nn.Module, read: fx.Node) -> fx.Node:
    """A call of a copy of the activation that leaves what it reads as it is."""
    name = f"{path}.after"
    if "after" not in module.get_submodule(path)._modules:
        module.get_submodule(path).add_module("after", without_inplace(act))
    return module.graph.call_module(name, (read,))


def _ghosts(module: fx.GraphModule, path: str, ghost: GhostModule, read: fx.Node) -> list[fx.Node]:
    cheap = ghost.cheap_operation
    if not isinstance(cheap, CheapOperation):
        return [module.graph.call_module(f"{path}.cheap_operation", (read,))]
    parts = []
    for k, (start, stop) in enumerate(ghost.cheap_ranges):
        part = module.graph.call_function(torch.narrow, (read, 1, start, stop - start))
        parts.append(module.graph.call_module(f"{path}.cheap_operation.convs.{k}", (part,)))
    return parts


def _affine(norm: BatchNorm, order: Tensor) -> _Affine:
    """Of a norm, by the channels as the ghost module computes them."""
    scale, shift = batchnorm_affine(norm)
    order = order.to(scale.device)
    return _Affine(scale[order], shift[order])


def _fold_ghost(ghost: GhostModule, affine: _Affine) -> Tensor | None:
    """Fold a norm into both convolutions; the shift that only the intrinsic maps as outputs may have, if it remains.

    The cheap operation reads the scaled intrinsic maps without the norm's shift, which its padding would not share.
    For one pixel there is no padding, and its bias takes the shift back; what reads activated maps read them with it.
    """
    m = ghost.primary_conv.out_channels
    scale, shift, none = affine.scale[:m], affine.shift[:m], torch.zeros_like(affine.shift[:m])
    if ghost.activation is not None:
        _scale(ghost, scale, shift)
        _scale_cheap(ghost, torch.ones_like(scale), none, affine)
        ghost.activation = nn.Sequential(*[c for c in ghost.activation.children() if not isinstance(c, BatchNorm)])
        return None
    floor = FLOOR * scale.abs().max().clamp_min(1e-30)
    scale = torch.where(scale.abs() < floor, floor, scale)
    if all(conv.kernel_size == (1, 1) for conv in ghost.cheap_convs):
        _scale(ghost, scale, shift)
        _scale_cheap(ghost, scale, shift, affine)
        return None
    _scale(ghost, scale, none)
    _scale_cheap(ghost, scale, none, affine)
    return shift.to(ghost.primary_conv.weight.dtype) if shift.any() else None


def _scale(ghost: GhostModule, scale: Tensor, shift: Tensor) -> None:
    conv = ghost.primary_conv
    bias = shift if conv.bias is None else conv.bias.double() * scale + shift
    conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])
    if bias.any():
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype))


def _scale_cheap(ghost: GhostModule, scale: Tensor, shift: Tensor, affine: _Affine) -> None:
    """Kernels for intrinsic maps with `scale` and `shift`; what they make goes through the norm's."""
    done = ghost.primary_conv.out_channels
    for conv, (start, _) in zip(ghost.cheap_convs, ghost.cheap_ranges, strict=True):
        outputs, width = conv.out_channels, conv.in_channels // conv.groups
        group = torch.arange(outputs, device=scale.device) // (outputs // conv.groups)
        source = start + group[:, None] * width + torch.arange(width, device=scale.device)
        own = affine.scale[done : done + outputs]
        kernels = conv.weight.double() * (own[:, None] / scale[source])[:, :, None, None]
        bias = affine.shift[done : done + outputs] - (kernels.sum((2, 3)) * shift[source]).sum(1)
        if conv.bias is not None:
            bias = bias + conv.bias.double() * own
        conv.weight.copy_(kernels)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype))
        done += outputs


def _merge_pointwise(ghost: GhostModule, order: Tensor) -> None:
    """Turn the cheap operation into a dense one that makes all maps, in the original's order."""
    cheap, m = ghost.cheap_operation, ghost.primary_conv.out_channels
    assert isinstance(cheap, nn.Conv2d)
    made = nn.Conv2d(m, len(order), 1, bias=cheap.bias is not None, device="meta")
    place = torch.argsort(order).to(cheap.weight.device)
    own = torch.eye(m, dtype=cheap.weight.dtype, device=cheap.weight.device)[:, :, None, None]
    made.weight = nn.Parameter(torch.cat((own, cheap.weight))[place])
    if cheap.bias is not None:
        made.bias = nn.Parameter(F.pad(cheap.bias, (m, 0))[place])
    ghost.cheap_operation = made


def _same_norm(ghost: GhostModule, norm: BatchNorm | None, order: Tensor) -> bool:
    """Whether the norm on the way to the cheap operation, if any, is still the one behind the ghost module."""
    assert ghost.activation is not None
    norms = [c for c in ghost.activation.modules() if isinstance(c, BatchNorm)]
    if norm is None or len(norms) != 1 or inner_modules(norms[0]):
        return norm is None and not norms
    m = ghost.primary_conv.out_channels
    own, behind = _affine(norms[0], torch.arange(m)), _affine(norm, order)
    return torch.allclose(own.scale, behind.scale[:m]) and torch.allclose(own.shift, behind.shift[:m])
