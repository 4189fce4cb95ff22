"""Convolutions of classes of their own: the plain one that does the same, found by watching a forward."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

from ghostify.graph.functional_conv import Conv2dCall, Conv2dRecorder
from ghostify.graph.modes import eval_mode
from ghostify.graph.op_queries import is_standard_conv


def to_standard_conv(conv: nn.Conv2d) -> nn.Conv2d | str:
    """A `Conv2d`, or timm's `Conv2dSame`, that computes in evaluation what `conv` does; or why there is none.

    Classes that standardise, normalise or otherwise compute their weight before one ordinary convolution amount to the
    first, those that also pad by TensorFlow's rule to the second. A plain one is returned as it is; what is made for
    another holds copies.
    """
    if is_standard_conv(conv):
        return conv
    calls, same = [], False
    for more in (0, 1):
        extent = [  # one position more than a multiple of the stride is where TensorFlow's rule pads most
            ((k - 1) * d // s + 4) * s + 1 + more
            for k, s, d in zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
        ]
        draw = torch.Generator().manual_seed(more)
        seen: list[Conv2dCall] = []
        probe = torch.randn(1, conv.in_channels, *extent, generator=draw).to(conv.weight)
        try:
            with eval_mode(conv), Conv2dRecorder(seen.append):
                made = conv(probe)
        except Exception as error:
            return f"it does not run by itself ({type(error).__name__}: {error})".splitlines()[0]
        if len(seen) != 1 or seen[0][1] is not made:
            return "its forward is not one convolution"
        calls.append(seen[0][0])
        if not _is(calls[-1]["input"], probe):
            same = _is(calls[-1]["input"], padded_same(conv, probe)) and _no_padding(calls[-1])
            if not same:
                return "it changes its input in a way of its own"
    first, second = calls
    if not _is(first["weight"], second["weight"]) or first["weight"].shape != conv.weight.shape:
        return "its weight depends on its input"
    return _conv(conv, first, same)


def _conv(conv: nn.Conv2d, call: dict[str, Any], same: bool) -> nn.Conv2d:
    weight, bias = call["weight"], call.get("bias")
    kind = Conv2dSame if same else nn.Conv2d
    with torch.device("meta"):  # older timm's takes no `device`
        made = kind(
            conv.in_channels,
            conv.out_channels,
            (weight.shape[2], weight.shape[3]),
            call.get("stride", 1),
            0 if same else call.get("padding", 0),
            call.get("dilation", 1),
            call.get("groups", 1),
            bias is not None,
        )
    trained = any(p.requires_grad for p in conv.parameters())
    made.weight = nn.Parameter(weight.detach().clone(), trained)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), trained)
    return made.train(conv.training)


def padded_same(conv: nn.Conv2d, image: Tensor) -> Tensor:
    """The image with zeros around it by TensorFlow's rule for the convolution."""
    padded: Tensor = pad_same(image, list(conv.kernel_size), list(conv.stride), list(conv.dilation))
    return padded


def _is(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _no_padding(call: dict[str, Any]) -> bool:
    padding = call.get("padding", 0)
    return padding == "valid" or not any((padding,) if isinstance(padding, int) else padding)
