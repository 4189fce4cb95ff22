"""Calls of `torch.nn.functional.conv2d` in a graph: their parameters and the equivalent module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ghostify.graph.op_queries import is_conv2d_function
from ghostify.graph.paths import resolve_attribute

Conv2dCall = tuple[dict[str, Any], Tensor]


def weight_path(module: nn.Module, node: fx.Node) -> str | None:
    """Path of the parameter that is a functional convolution's weight, None where the weight is computed."""
    if not is_conv2d_function(node):
        return None
    bound = _bind(node)
    for key in ("weight", "bias"):
        value = bound[key]
        if value is None and key == "bias":
            continue
        is_attribute = isinstance(value, fx.Node) and value.op == "get_attr"
        if not is_attribute or not isinstance(resolve_attribute(module, value.target), nn.Parameter):
            return None
    if any(isinstance(bound[k], fx.Node) for k in ("stride", "padding", "dilation", "groups")):
        return None
    return str(bound["weight"].target)


def as_conv_module(module: nn.Module, node: fx.Node) -> nn.Conv2d:
    """A `Conv2d` that holds the parameters of a functional convolution itself, not copies."""
    bound = _bind(node)
    weight = resolve_attribute(module, bound["weight"].target)
    bias = None if bound["bias"] is None else resolve_attribute(module, bound["bias"].target)
    conv = nn.Conv2d(
        weight.shape[1] * bound["groups"],
        weight.shape[0],
        tuple(weight.shape[2:]),
        bound["stride"],
        bound["padding"],
        bound["dilation"],
        bound["groups"],
        bias is not None,
        device="meta",
    )
    conv.weight, conv.bias = weight, bias
    return conv.train(module.training)


def call_settings_key(node: fx.Node) -> str:
    """A key of all arguments of a functional convolution except its input."""
    bound = {k: v.target if isinstance(v, fx.Node) else v for k, v in _bind(node).items() if k != "input"}
    return str(sorted(bound.items()))


def _bind(node: fx.Node) -> dict[str, Any]:
    return conv2d_arguments(node.args, node.kwargs)


class Conv2dRecorder(TorchFunctionMode):
    """While active, passes every call of conv2d to `on_call`: its arguments by name, and its output."""

    def __init__(self, on_call: Callable[[Conv2dCall], None]) -> None:
        self.on_call = on_call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.conv2d:
            self.on_call((conv2d_arguments(args, kwargs or {}), output))
        return output


def conv2d_arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a conv2d call by name, defaults included."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return defaults | dict(zip(names, args, strict=False)) | dict(kwargs)
