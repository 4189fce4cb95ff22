"""`torch.nn.functional.conv2d` in a traced graph: the parameters it takes, and the module that would do the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ghostify.graph.op_queries import is_conv2d_function

Conv2dCall = tuple[dict[str, Any], Tensor]


def weight_path(module: nn.Module, node: fx.Node) -> str | None:
    """Path of the parameter a functional convolution takes as weight, or None where it is computed."""
    if not is_conv2d_function(node):
        return None
    bound = _bind(node)
    for key in ("weight", "bias"):
        value = bound[key]
        if value is None and key == "bias":
            continue
        fetched = isinstance(value, fx.Node) and value.op == "get_attr"
        if not fetched or not isinstance(resolve_attribute(module, value.target), nn.Parameter):
            return None
    if any(isinstance(bound[k], fx.Node) for k in ("stride", "padding", "dilation", "groups")):
        return None
    return str(bound["weight"].target)


def as_conv_module(module: nn.Module, node: fx.Node) -> nn.Conv2d:
    """A `Conv2d` around the parameters of a functional convolution."""
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
    """Everything a functional convolution is called with but its input."""
    bound = {k: v.target if isinstance(v, fx.Node) else v for k, v in _bind(node).items() if k != "input"}
    return str(sorted(bound.items()))


def resolve_attribute(module: nn.Module, path: str) -> Any:
    """What lies at a dotted path."""
    return operator.attrgetter(path)(module)


def _bind(node: fx.Node) -> dict[str, Any]:
    return conv2d_arguments(node.args, node.kwargs)


class Conv2dRecorder(TorchFunctionMode):
    """While it lasts, every call of conv2d goes to `note`: its arguments by name, and what it made."""

    def __init__(self, note: Callable[[Conv2dCall], None]) -> None:
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.conv2d:
            self.note((conv2d_arguments(args, kwargs or {}), made))
        return made


def conv2d_arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of conv2d by name, its defaults included."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return defaults | dict(zip(names, args, strict=False)) | dict(kwargs)
