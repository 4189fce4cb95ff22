"""Checks of the standard layers in a saved model: their numbers are numbers, and fit their weights and each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ghostify.errors import GhostifyError
from ghostify.modules.ghost import CheapOperation, GhostModule

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
NAMED_PADDINGS = ("same", "valid")


def check_layer(path: str, layer: nn.Module) -> None:
    """Raise `GhostifyError` for a convolution, a norm, a linear layer or a ghost module whose values do not fit."""
    for cls, is_consistent in CHECKS.items():
        if isinstance(layer, cls) and not is_consistent(layer):
            raise GhostifyError(f"module {path!r}: its values are not those of a {type(layer).__name__}")


def _is_conv(conv: Any) -> bool:
    fields = vars(conv)
    channels = [fields.get(key) for key in ("in_channels", "out_channels", "groups")]
    sizes = [fields.get(key) for key in ("kernel_size", "stride", "dilation")]
    padding = fields.get("padding")
    if not all(map(_is_count, channels)) or not all(_are_counts(size) for size in sizes):
        return False
    if padding not in NAMED_PADDINGS and not _are_counts(padding, least=0):
        return False
    first, second, groups = channels if isinstance(conv, _ConvTransposeNd) else (channels[1], channels[0], channels[2])
    shape = (first, second // groups, *conv.kernel_size)
    return fields.get("padding_mode") in PADDING_MODES and _has_shapes(conv, weight=shape, bias=(conv.out_channels,))


def _is_norm(norm: Any) -> bool:
    fields = vars(norm)
    count, momentum = fields.get("num_features"), fields.get("momentum")
    flags = [fields.get(key) for key in ("affine", "track_running_stats")]
    if not _is_count(count) or not _is_number(fields.get("eps")) or not all(isinstance(flag, bool) for flag in flags):
        return False
    shape = (count,)
    is_shaped = _has_shapes(norm, weight=shape, bias=shape, running_mean=shape, running_var=shape)
    return is_shaped and (momentum is None or _is_number(momentum))


def _is_linear(linear: Any) -> bool:
    sizes = [vars(linear).get(key) for key in ("out_features", "in_features")]
    return all(map(_is_count, sizes)) and _has_shapes(linear, weight=tuple(sizes), bias=(sizes[0],))


def _is_ghost(ghost: Any) -> bool:
    primary, cheap = (ghost._modules.get(name) for name in ("primary_conv", "cheap_operation"))
    order = ghost._buffers.get("order")
    has_convs = isinstance(primary, nn.Conv2d) and isinstance(cheap, nn.Conv2d | CheapOperation)
    has_activation = isinstance(vars(ghost).get("activation", ghost._modules.get("activation")), nn.Module | None)
    return has_convs and has_activation and (order is None or _is_permutation(order))


def _is_cheap_operation(cheap: Any) -> bool:
    convs, ranges = cheap._modules.get("convs"), vars(cheap).get("ranges")
    if not isinstance(convs, nn.ModuleList) or not isinstance(ranges, list | tuple):
        return False
    are_convs = all(isinstance(conv, nn.Conv2d) for conv in convs)
    are_ranges = all(_are_counts(pair, least=0) and len(pair) == 2 for pair in ranges)
    return are_convs and are_ranges and len(ranges) == len(convs) > 0


def _is_permutation(order: Tensor) -> bool:
    return order.is_meta or (order.dim() == 1 and sorted(order.tolist()) == list(range(len(order))))


CHECKS: dict[type[nn.Module], Callable[[Any], bool]] = {
    _ConvNd: _is_conv,
    _NormBase: _is_norm,
    nn.Linear: _is_linear,
    GhostModule: _is_ghost,
    CheapOperation: _is_cheap_operation,
}


def _has_shapes(layer: nn.Module, **shapes: tuple[int, ...]) -> bool:
    """Whether the parameters and buffers of these names have these shapes, where the layer has them."""
    tensors = ((layer._parameters.get(name, layer._buffers.get(name)), shape) for name, shape in shapes.items())
    return all(tensor is None or tuple(tensor.shape) == shape for tensor, shape in tensors)


def _is_count(value: object, least: int = 1) -> bool:
    return type(value) is int and value >= least


def _are_counts(values: object, least: int = 1) -> bool:
    return isinstance(values, list | tuple) and all(_is_count(value, least) for value in values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
