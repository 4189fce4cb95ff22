"""Standard convolutions that are equivalent to `Conv2d` subclasses, derived from the conv2d calls of their forward."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

from ghostify import skip_reasons
from ghostify.graph.functional_conv import Conv2dCall, Conv2dRecorder
from ghostify.graph.modes import eval_mode
from ghostify.graph.op_queries import is_standard_conv
from ghostify.text import first_line


def to_standard_conv(conv: nn.Conv2d) -> nn.Conv2d | str:
    """The `Conv2d`, or timm's `Conv2dSame`, that computes in evaluation what `conv` does; else why there is none.

    Subclasses that standardise, normalise or otherwise compute their weight before one ordinary convolution are
    equivalent to a `Conv2d`, those that also pad by TensorFlow's rule to a `Conv2dSame`. A standard convolution is
    returned itself; the equivalent of any other holds copies of its tensors.
    """
    if is_standard_conv(conv):
        return conv
    calls, pads_same = [], False
    for extra in (0, 1):
        size = [  # one position more than a multiple of the stride is where TensorFlow's rule pads most
            ((k - 1) * d // s + 4) * s + 1 + extra
            for k, s, d in zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
        ]
        generator = torch.Generator().manual_seed(extra)
        recorded: list[Conv2dCall] = []
        probe = torch.randn(1, conv.in_channels, *size, generator=generator).to(conv.weight)
        try:
            with eval_mode(conv), Conv2dRecorder(recorded.append):
                output = conv(probe)
        except Exception as error:
            return f"{skip_reasons.FAILS_ALONE} ({type(error).__name__}: {first_line(error)})"
        if len(recorded) != 1 or recorded[0][1] is not output:
            return skip_reasons.NOT_ONE_CONVOLUTION
        calls.append(recorded[0][0])
        if not _equal(calls[-1]["input"], probe):
            pads_same = _equal(calls[-1]["input"], padded_same(conv, probe)) and _no_padding(calls[-1])
            if not pads_same:
                return skip_reasons.TRANSFORMED_INPUT
    first, second = calls
    if not _equal(first["weight"], second["weight"]) or first["weight"].shape != conv.weight.shape:
        return skip_reasons.INPUT_DEPENDENT_WEIGHT
    return _conv_from_call(conv, first, pads_same)


def _conv_from_call(conv: nn.Conv2d, call: dict[str, Any], pads_same: bool) -> nn.Conv2d:
    weight, bias = call["weight"], call.get("bias")
    conv_class = Conv2dSame if pads_same else nn.Conv2d
    with torch.device("meta"):  # older versions of timm have no `device` parameter
        standard = conv_class(
            conv.in_channels,
            conv.out_channels,
            (weight.shape[2], weight.shape[3]),
            call.get("stride", 1),
            0 if pads_same else call.get("padding", 0),
            call.get("dilation", 1),
            call.get("groups", 1),
            bias is not None,
        )
    is_trained = any(p.requires_grad for p in conv.parameters())
    standard.weight = nn.Parameter(weight.detach().clone(), is_trained)
    if bias is not None:
        standard.bias = nn.Parameter(bias.detach().clone(), is_trained)
    return standard.train(conv.training)


def padded_same(conv: nn.Conv2d, image: Tensor) -> Tensor:
    """The image (N x C x H x W) padded with zeros by TensorFlow's rule for the convolution."""
    padded: Tensor = pad_same(image, list(conv.kernel_size), list(conv.stride), list(conv.dilation))
    return padded


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _no_padding(call: dict[str, Any]) -> bool:
    padding = call.get("padding", 0)
    return padding == "valid" or not any((padding,) if isinstance(padding, int) else padding)
