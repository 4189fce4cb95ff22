"""The ghost module (GhostNet, Han et al., CVPR 2020): an ordinary torch module, independent of graphs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from ghostify.arguments import a_module, instance_of, optional
from ghostify.errors import GhostifyError
from ghostify.modules.hooks import has_hooks
from ghostify.modules.layout import CheapConvSpec, GhostLayout


class CheapOperation(nn.Module):
    """The ghosts' convolutions where these do not divide evenly: each reads a range of the intrinsic maps.

    N x m x H x W -> N x ghosts x H x W.
    """

    def __init__(self, specs: tuple[CheapConvSpec, ...], convs: list[nn.Conv2d]) -> None:
        super().__init__()
        self.ranges = tuple((spec.start, spec.stop) for spec in specs)
        self.convs = nn.ModuleList(convs)

    def forward(self, intrinsic: Tensor) -> Tensor:
        maps = [conv(intrinsic[:, start:stop]) for (start, stop), conv in zip(self.ranges, self.convs, strict=True)]
        return maps[0] if len(maps) == 1 else torch.cat(maps, 1)


FORWARDED_ATTRIBUTES = ("weight", "in_channels", "kernel_size", "stride", "padding", "padding_mode", "dilation")


@dataclass(frozen=True, eq=False)
class GhostWeights:
    """Fitted weights of the ghost module that replaces a convolution, in the order in which it computes its maps.

    `channels` is the original output channel of each computed map, m intrinsic ones before the ghosts. `norm_shift` (by
    original channel) are the constants that the following BatchNorm absorbs. `fit_error` is the relative reconstruction
    error per original channel on the calibration images (None for weights without images), `holdout_error` the same on
    the holdout images, and `output_error` the relative squared error of the model's outputs that follows from it.
    Ghosts that are `activated` read the intrinsic maps after norm and activation.
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
    """Intrinsic maps computed by `primary_conv`, and ghosts computed from them by `cheap_operation`, concatenated.

    N x C x H x W -> N x (m + ghosts) x H' x W'. `order`, if given, is for every output channel its position in the
    concatenation. `activation`, if given, is applied to the intrinsic maps that the cheap operation reads, and only to
    these: the norm and activation that follow the module apply to all maps. With `recompute`, training stores the
    module's output for the backward pass, and not the intrinsic maps as well: less memory where a following norm stores
    the output anyway, and an error where an operation overwrites it. Formula: Han et al., 2020, equations 2 and 3.
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
        for name, module in (("primary_conv", primary_conv), ("cheap_operation", cheap_operation)):
            a_module(name, module)
        optional(a_module)("activation", activation)
        optional(instance_of(Tensor, "Pass the position of each output channel."))("order", order)
        self.primary_conv = primary_conv
        self.cheap_operation = cheap_operation
        self.activation = activation
        self.register_buffer("order", order)

    def __getattr__(self, name: str) -> Any:
        """`FORWARDED_ATTRIBUTES`, which forward methods read from a convolution, are those of the primary one."""
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
        """For each of `cheap_convs` the range of intrinsic maps that it reads: start and stop."""
        cheap: Any = self.cheap_operation
        return cheap.ranges if isinstance(cheap, CheapOperation) else ((0, cheap.in_channels),)

    @property
    def layout(self) -> GhostLayout | None:
        """The layout that the module was built from, derived from its convolutions; None where these were replaced."""
        convs, m = self.cheap_convs, self.primary_conv.out_channels
        if any(not isinstance(conv, nn.Conv2d) or len(set(conv.kernel_size)) > 1 for conv in convs):
            return None
        size, width = convs[0].kernel_size[0], convs[0].in_channels // convs[0].groups
        specs = [
            CheapConvSpec(start, stop, conv.groups, conv.out_channels, conv.kernel_size[0])
            for (start, stop), conv in zip(self.cheap_ranges, convs, strict=True)
        ]
        try:
            layout = GhostLayout.of_width(m + sum(spec.outputs for spec in specs), m, width, size)
        except GhostifyError:
            return None
        return layout if list(layout.conv_specs) == specs else None

    def forward(self, x: Tensor) -> Tensor:
        intrinsic = self.primary_conv(x)
        if self.recompute and isinstance(intrinsic, Tensor) and intrinsic.requires_grad and torch.is_grad_enabled():
            submodules = self.cheap_operation.modules()
            if self.activation is None and not torch.compiler.is_compiling() and all(map(_is_recomputable, submodules)):
                weights = [p for conv in self.cheap_convs for p in (conv.weight, conv.bias)]
                if not _is_transformed(intrinsic, *weights):
                    output: Tensor = _RecomputingConcat.apply(
                        intrinsic, (self.cheap_ranges, self.cheap_convs), self.order, *weights
                    )
                    return output
        cheap_input = intrinsic if self.activation is None else self.activation(intrinsic)
        return concat_channels(intrinsic, self.cheap_operation(cheap_input), self.order)


@fx.wrap
def concat_channels(intrinsic: Tensor, ghosts: Tensor, order: Tensor | None) -> Tensor:
    """Concatenate channels, permute them by `order` if given, in the intrinsic maps' memory format; one graph node."""
    maps = torch.cat((intrinsic, ghosts), 1)
    if _is_transformed() or maps.is_quantized or not is_channels_last(intrinsic):
        return maps if order is None else maps.index_select(1, order)
    if order is not None:
        nhwc = maps.permute(0, 2, 3, 1)
        maps = nhwc.gather(3, order.expand_as(nhwc)).permute(0, 3, 1, 2)  # index_select is six times slower here
    return maps.contiguous(memory_format=torch.channels_last)


_CheapConvs = tuple[Sequence[tuple[int, int]], Sequence[Any]]  # ranges of intrinsic maps, and the convolutions on them


class _RecomputingConcat(torch.autograd.Function):
    """Concatenation of intrinsic maps and ghosts whose backward reads the intrinsic maps from the output."""

    @staticmethod
    def forward(
        ctx: Any, intrinsic: Tensor, cheap: _CheapConvs, order: Tensor | None, *weights: Tensor | None
    ) -> Tensor:
        output = concat_channels(intrinsic, _apply_cheap(cheap, intrinsic, weights), order)
        ctx.cheap, ctx.intrinsic_count = cheap, intrinsic.shape[1]
        ctx.save_for_backward(output, order, *weights)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        output, order, *weights = ctx.saved_tensors
        m = ctx.intrinsic_count
        if order is not None:
            positions = torch.argsort(order)
            output, gradient = output.index_select(1, positions[:m]), gradient.index_select(1, positions)
        trained = [k for k, needs_grad in enumerate(ctx.needs_input_grad[3:]) if needs_grad]

        def ghosts(intrinsic: Tensor, *trained_weights: Tensor) -> Tensor:
            by_position = dict(zip(trained, trained_weights, strict=True))
            return _apply_cheap(ctx.cheap, intrinsic, [by_position.get(k, w) for k, w in enumerate(weights)])

        vjp = torch.func.vjp(ghosts, output.narrow(1, 0, m), *(weights[k] for k in trained))[1]
        intrinsic_gradient, *weight_gradients = vjp(gradient[:, m:])
        by_position = dict(zip(trained, weight_gradients, strict=True))
        return (gradient[:, :m] + intrinsic_gradient, None, None, *(by_position.get(k) for k in range(len(weights))))


def _apply_cheap(cheap: _CheapConvs, intrinsic: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
    """The ghosts that the cheap convolutions compute with these weights and biases, in the dtype of their input."""
    cast = [None if w is None else w.to(intrinsic.dtype) for w in weights]
    maps = [
        conv._conv_forward(intrinsic[:, start:stop], cast[2 * k], cast[2 * k + 1])
        for k, ((start, stop), conv) in enumerate(zip(*cheap, strict=True))
    ]
    return maps[0] if len(maps) == 1 else torch.cat(maps, 1)


def _is_transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func is active, which sees plain operations only and hides the memory format, or
    one of the tensors carries a forward derivative."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _is_recomputable(module: nn.Module) -> bool:
    """Whether a module is a hook-free convolution with a weight of its own, or a hook-free container of such."""
    has_weight = type(module) is nn.Conv2d and "weight" in module._parameters
    return not has_hooks(module) and (has_weight or type(module) in (CheapOperation, nn.ModuleList))


def build_ghost_module(conv: nn.Conv2d, layout: GhostLayout) -> GhostModule:
    """A ghost module with zero weights and `conv`'s stride, padding, dilation, bias, dtype, device and flags."""
    primary = copy.copy(conv)
    primary._parameters, primary._buffers = dict(conv._parameters), dict(conv._buffers)
    primary.out_channels = layout.intrinsic
    primary.weight = _zeros_like(conv.weight, (layout.intrinsic, *conv.weight.shape[1:]))
    if conv.bias is not None:
        primary.bias = _zeros_like(conv.bias, (layout.intrinsic,))
    specs = layout.conv_specs
    convs = [_cheap_conv(conv, spec) for spec in specs]
    reads_all_maps = len(convs) == 1 and specs[0].stop == layout.intrinsic
    cheap = convs[0] if reads_all_maps else CheapOperation(specs, convs)
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
    cheap.weight = _zeros_like(conv.weight, tuple(cheap.weight.shape))
    if conv.bias is not None:
        cheap.bias = _zeros_like(conv.bias, (spec.outputs,))
    return cheap


def _zeros_like(parameter: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    channels_last = len(shape) == 4 and is_channels_last(parameter)
    data = torch.empty(
        shape,
        dtype=parameter.dtype,
        device=parameter.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    return nn.Parameter(data.zero_(), requires_grad=parameter.requires_grad)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is laid out N x H x W x C; the strides decide for 1 x 1 filters, contiguous in both formats."""
    if tensor.dim() != 4 or not tensor.is_contiguous(memory_format=torch.channels_last):
        return False
    return not tensor.is_contiguous() or (tensor.shape[1] > 1 and tensor.stride(3) == tensor.shape[1])
