"""The ghost module (GhostNet, Han et al., CVPR 2020): ordinary torch, knows no graphs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.errors import GhostifyError
from ghostify.modules.hooks import has_hooks
from ghostify.modules.layout import CheapConvSpec, GhostLayout


class CheapOperation(nn.Module):
    """The ghosts' convolutions where they do not divide evenly: each reads a run of the intrinsic maps."""

    def __init__(self, specs: tuple[CheapConvSpec, ...], convs: list[nn.Conv2d]) -> None:
        super().__init__()
        self.ranges = tuple((spec.start, spec.stop) for spec in specs)
        self.convs = nn.ModuleList(convs)

    def forward(self, intrinsic: Tensor) -> Tensor:
        maps = [conv(intrinsic[:, a:b]) for (a, b), conv in zip(self.ranges, self.convs, strict=True)]
        return maps[0] if len(maps) == 1 else torch.cat(maps, 1)


FORWARDED_ATTRIBUTES = ("weight", "in_channels", "kernel_size", "stride", "padding", "padding_mode", "dilation")


@dataclass(frozen=True, eq=False)
class GhostWeights:
    """Everything that turns one convolution into its ghost module, in the order the module computes its maps.

    `channels` names for each computed map (m intrinsic, then ghosts) the original output channel. `norm_shift` holds,
    by original channel, the constants that the following BatchNorm takes up. `fit_error` is the relative reconstruction
    error per original channel, on the calibration images; `holdout_error` the same on images the fit did not see, and
    `output_error` the relative squared error of the model's outputs that follows from it. `activated` ghosts read the
    intrinsic maps behind norm and activation.
    """

    channels: Tensor
    primary_weight: Tensor
    primary_bias: Tensor | None
    cheap_weight: Tensor
    cheap_bias: Tensor | None
    norm_shift: Tensor | None = None
    fit_error: Tensor | None = None
    holdout_error: Tensor | None = None
    output_error: float | None = None
    activated: bool = False


class GhostModule(nn.Module):
    """Intrinsic maps by `primary_conv`, ghosts from them by `cheap_operation`, concatenated.

    N x C x H x W -> N x (m + ghosts) x H' x W'. `order`, where given, holds for every output channel its place in the
    concatenation; `activation` what the intrinsic maps go through on their way to the cheap operation, and only there:
    norm and activation behind the module come to all maps. With `recompute`, training keeps the module's output for
    the backward and not the intrinsic maps beside it: less memory where a norm behind keeps the output anyway, an error
    where somebody overwrites it. Formula: Han et al., 2020, equations 2 and 3.
    """

    order: Tensor | None
    recompute = False

    def __init__(
        self,
        primary_conv: nn.Conv2d,
        cheap_operation: nn.Module,
        order: Tensor | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.primary_conv = primary_conv
        self.cheap_operation = cheap_operation
        self.activation = activation
        self.register_buffer("order", order)

    def __getattr__(self, name: str) -> Any:
        """What forwards ask a convolution for, its weight's dtype or its stride, is that of the primary one."""
        if name in FORWARDED_ATTRIBUTES:
            return getattr(super().__getattr__("primary_conv"), name)
        return super().__getattr__(name)

    @property
    def cheap_convs(self) -> tuple[nn.Conv2d, ...]:
        """The convolutions of the cheap operation, in the order of their maps."""
        cheap: Any = self.cheap_operation
        convs: Any = cheap.convs if isinstance(cheap, CheapOperation) else (cheap,)
        return tuple(convs)

    @property
    def cheap_ranges(self) -> tuple[tuple[int, int], ...]:
        """For each of these convolutions the intrinsic maps that it reads: the first, and the one after the last."""
        cheap: Any = self.cheap_operation
        return cheap.ranges if isinstance(cheap, CheapOperation) else ((0, cheap.in_channels),)

    @property
    def layout(self) -> GhostLayout | None:
        """The layout that it was built from, read off its convolutions; None where these were replaced by others."""
        convs, m = self.cheap_convs, self.primary_conv.out_channels
        if any(not isinstance(conv, nn.Conv2d) or len(set(conv.kernel_size)) > 1 for conv in convs):
            return None
        size, width = convs[0].kernel_size[0], convs[0].in_channels // convs[0].groups
        found = [
            CheapConvSpec(start, stop, conv.groups, conv.out_channels, conv.kernel_size[0])
            for (start, stop), conv in zip(self.cheap_ranges, convs, strict=True)
        ]
        try:
            layout = GhostLayout.of_width(m + sum(spec.outputs for spec in found), m, width, size)
        except GhostifyError:
            return None
        return layout if list(layout.conv_specs) == found else None

    def forward(self, x: Tensor) -> Tensor:
        intrinsic = self.primary_conv(x)
        if self.recompute and isinstance(intrinsic, Tensor) and intrinsic.requires_grad and torch.is_grad_enabled():
            inner = self.cheap_operation.modules()
            if self.activation is None and not torch.compiler.is_compiling() and all(map(_is_hook_free, inner)):
                weights = [p for conv in self.cheap_convs for p in (conv.weight, conv.bias)]
                made: Tensor = _RecomputingConcat.apply(
                    intrinsic, (self.cheap_ranges, self.cheap_convs), self.order, *weights
                )
                return made
        read = intrinsic if self.activation is None else self.activation(intrinsic)
        return concat_channels(intrinsic, self.cheap_operation(read), self.order)


@fx.wrap
def concat_channels(intrinsic: Tensor, ghosts: Tensor, order: Tensor | None) -> Tensor:
    """Concatenate, in the given order if any, in the memory format of the intrinsic maps; one node when traced."""
    maps = torch.cat((intrinsic, ghosts), 1)
    if not is_channels_last(intrinsic):
        return maps if order is None else maps.index_select(1, order)
    if order is not None:
        last = maps.permute(0, 2, 3, 1)
        maps = last.gather(3, order.expand_as(last)).permute(0, 3, 1, 2)  # index_select is six times slower here
    return maps.contiguous(memory_format=torch.channels_last)


_Cheap = tuple[Sequence[tuple[int, int]], Sequence[Any]]


class _RecomputingConcat(torch.autograd.Function):
    """Intrinsic maps and their ghosts, joined; the backward finds the former in what it made of them."""

    @staticmethod
    def forward(ctx: Any, intrinsic: Tensor, cheap: _Cheap, order: Tensor | None, *weights: Tensor | None) -> Tensor:
        made = concat_channels(intrinsic, _ghosts(cheap, intrinsic, weights), order)
        ctx.cheap, ctx.count = cheap, intrinsic.shape[1]
        ctx.save_for_backward(made, order, *weights)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        made, order, *weights = ctx.saved_tensors
        if order is not None:
            places = torch.argsort(order)
            made, gradient = made.index_select(1, places[: ctx.count]), gradient.index_select(1, places)
        wanted = [k for k, needed in enumerate(ctx.needs_input_grad[3:]) if needed]

        def ghosts(read: Tensor, *changed: Tensor) -> Tensor:
            by_place = dict(zip(wanted, changed, strict=True))
            return _ghosts(ctx.cheap, read, [by_place.get(k, w) for k, w in enumerate(weights)])

        back = torch.func.vjp(ghosts, made.narrow(1, 0, ctx.count), *(weights[k] for k in wanted))[1]
        through, *found = back(gradient[:, ctx.count :])
        by_weight = dict(zip(wanted, found, strict=True))
        return (gradient[:, : ctx.count] + through, None, None, *(by_weight.get(k) for k in range(len(weights))))


def _ghosts(cheap: _Cheap, read: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
    """What the cheap operation makes with these weights and biases, in the type of what it reads."""
    cast = [None if w is None else w.to(read.dtype) for w in weights]
    maps = [
        conv._conv_forward(read[:, a:b], cast[2 * k], cast[2 * k + 1])
        for k, ((a, b), conv) in enumerate(zip(*cheap, strict=True))
    ]
    return maps[0] if len(maps) == 1 else torch.cat(maps, 1)


def _is_hook_free(part: nn.Module) -> bool:
    """Whether it is a convolution's own weight and bias that compute, or a container of such, and nobody looks on."""
    convolves = type(part) is nn.Conv2d and "weight" in part._parameters
    return not has_hooks(part) and (convolves or type(part) in (CheapOperation, nn.ModuleList))


def build_ghost_module(conv: nn.Conv2d, layout: GhostLayout) -> GhostModule:
    """An uninitialised ghost module with `conv`'s attributes: stride, padding, dilation, bias, dtype, device, flags."""
    primary = copy.copy(conv)
    primary._parameters, primary._buffers = dict(conv._parameters), dict(conv._buffers)
    primary.out_channels = layout.intrinsic
    primary.weight = _like(conv.weight, (layout.intrinsic, *conv.weight.shape[1:]))
    if conv.bias is not None:
        primary.bias = _like(conv.bias, (layout.intrinsic,))
    specs = layout.conv_specs
    convs = [_cheap_conv(conv, spec) for spec in specs]
    whole = len(convs) == 1 and specs[0].stop == layout.intrinsic
    cheap = convs[0] if whole else CheapOperation(specs, convs)
    return GhostModule(primary, cheap).train(conv.training)


def _cheap_conv(conv: nn.Conv2d, spec: CheapConvSpec) -> nn.Conv2d:
    cheap = nn.Conv2d(
        spec.stop - spec.start,
        spec.outputs,
        spec.kernel_size,
        padding=spec.kernel_size // 2,
        groups=spec.groups,
        bias=conv.bias is not None,
        device="meta",
    )
    cheap.weight = _like(conv.weight, tuple(cheap.weight.shape))
    if conv.bias is not None:
        cheap.bias = _like(conv.bias, (spec.outputs,))
    return cheap


def _like(parameter: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    last = len(shape) == 4 and is_channels_last(parameter)
    data = torch.empty(
        shape,
        dtype=parameter.dtype,
        device=parameter.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    return nn.Parameter(data.zero_(), requires_grad=parameter.requires_grad)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is laid out N x H x W x C. Of 1 x 1 filters, which are both, only the strides tell."""
    if tensor.dim() != 4 or not tensor.is_contiguous(memory_format=torch.channels_last):
        return False
    return not tensor.is_contiguous() or (tensor.shape[1] > 1 and tensor.stride(3) == tensor.shape[1])
