"""The operator table: one row per known operator, with its forms as modules, functions and methods."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import (
    AvgPool2dSame,
    BatchNormAct2d,
    Conv2dSame,
    DropBlock2d,
    DropPath,
    Linear,
    SyncBatchNormAct,
    activations,
)
from timm.layers.drop import drop_path
from timm.layers.pool2d_same import MaxPool2dSame
from torch import fx, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth, stochastic_depth

POSITIONS = {2, 3}
METADATA = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
NORM = ("weight", "bias", "running_mean", "running_var")

Condition = Callable[[fx.Node], bool]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, passed by position or by name; `default` where it is not passed."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _always(_: fx.Node) -> bool:
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_off_in_eval(position: int, default: bool) -> Condition:
    """The condition that the argument `training`, at `position`, is False or a module's mode."""

    def condition(node: fx.Node) -> bool:
        training = argument(node, position, "training", default)
        return training.op == "call_module" if isinstance(training, fx.Node) else not training

    return condition


def _clamps_to_interval(node: fx.Node) -> bool:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    are_constant = all(bound is None or _is_number(bound) for bound in (low, high))
    return are_constant and (-math.inf if low is None else low) < (math.inf if high is None else high)


def _has_constant_exponent(node: fx.Node) -> bool:
    return _is_number(argument(node, 1, "exponent"))


def _pads_positions(node: fx.Node) -> bool:
    pad = argument(node, 1, "pad")
    return isinstance(pad, list | tuple) and len(pad) <= 2 * len(POSITIONS)


def _is_over_positions(node: fx.Node) -> bool:
    dims = argument(node, 1, "dim")
    dims = dims if isinstance(dims, list | tuple) else (dims,)
    return all(isinstance(d, int) for d in dims) and {d % 4 for d in dims} == POSITIONS


def _is_metadata(node: fx.Node) -> bool:
    return argument(node, 1, "name") in METADATA


def _clamp(min: float | None = None, max: float | None = None) -> nn.Module:  # noqa: A002
    return nn.Hardtanh(-math.inf if min is None else min, math.inf if max is None else max)


@dataclass(frozen=True)
class Op:
    """An operator, its forms as modules, functions and methods, and properties that all forms share.

    `channel_independent`: every output channel is the same function of the input channel of the same index.
    `channel_parameters`: names of the tensors with one entry per channel, which are attributes of a module and
    arguments of a function; such an operator keeps channels apart too, but slicing or permuting channels must slice or
    permute them. `pointwise`: every output value depends on the input values at the same position only. `activation`:
    builds an equivalent module from a call's arguments after the first. `identity_in_eval`: returns its input in
    evaluation. `pools`: reduces several positions to one. `binary`: combines two operands. `allocates`: the output
    never shares memory with the input, and only the in-place forms write to the input. `when`: a call whose arguments
    do not meet this condition is not this operator.
    """

    name: str
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    channel_independent: bool = False
    channel_parameters: tuple[str, ...] = ()
    pointwise: bool = False
    activation: Callable[..., nn.Module] | None = None
    identity_in_eval: bool = False
    pools: bool = False
    binary: bool = False
    allocates: bool = False
    when: Condition = _always


def _activation(
    name: str, module: type[nn.Module], functions: tuple[Any, ...] = (), methods: tuple[str, ...] = (),
    other_modules: tuple[type[nn.Module], ...] = (),
) -> Op:  # fmt: skip
    """An activation; `module` takes the same arguments as the functions, `other_modules` are other classes of it."""
    return Op(
        name, (module, *other_modules), functions, methods, True, pointwise=True, activation=module, allocates=True
    )


def _unary(name: str, functions: tuple[Any, ...], methods: tuple[str, ...], when: Condition = _always) -> Op:
    return Op(name, (), functions, methods, True, pointwise=True, allocates=True, when=when)


def _binary(name: str, functions: tuple[Any, ...], methods: tuple[str, ...]) -> Op:
    return Op(name, (), functions, methods, pointwise=True, binary=True, allocates=True)


def _no_op(
    name: str, modules: tuple[type[nn.Module], ...], functions: tuple[Any, ...] = (), when: Condition = _always
) -> Op:
    return Op(name, modules, functions, (), True, identity_in_eval=True, when=when)


def _pooling(
    name: str, modules: tuple[type[nn.Module], ...], functions: tuple[Any, ...], methods: tuple[str, ...] = (),
    when: Condition = _always,
) -> Op:  # fmt: skip
    return Op(name, modules, functions, methods, True, pools=True, allocates=True, when=when)


OPS = (
    _activation("relu", nn.ReLU, (F.relu, F.relu_, torch.relu, torch.relu_), ("relu", "relu_")),
    _activation("relu6", nn.ReLU6, (F.relu6,)),
    _activation("leaky_relu", nn.LeakyReLU, (F.leaky_relu, F.leaky_relu_)),
    _activation("elu", nn.ELU, (F.elu, F.elu_)),
    _activation("celu", nn.CELU, (F.celu, F.celu_, torch.celu, torch.celu_)),
    _activation("selu", nn.SELU, (F.selu, F.selu_, torch.selu, torch.selu_)),
    _activation("gelu", nn.GELU, (F.gelu,), other_modules=(activations.GELU,)),
    _activation("silu", nn.SiLU, (F.silu,), other_modules=(activations.Swish,)),
    _activation("mish", nn.Mish, (F.mish,), other_modules=(activations.Mish,)),
    _activation("hardswish", nn.Hardswish, (F.hardswish,), other_modules=(activations.HardSwish,)),
    _activation("hardsigmoid", nn.Hardsigmoid, (F.hardsigmoid,), other_modules=(activations.HardSigmoid,)),
    _activation("hardtanh", nn.Hardtanh, (F.hardtanh, F.hardtanh_)),
    _activation("sigmoid", nn.Sigmoid, (F.sigmoid, torch.sigmoid, torch.sigmoid_), ("sigmoid", "sigmoid_"),
                (activations.Sigmoid,)),
    _activation("tanh", nn.Tanh, (F.tanh, torch.tanh, torch.tanh_), ("tanh", "tanh_"), (activations.Tanh,)),
    _activation("softplus", nn.Softplus, (F.softplus,)),
    _activation("softsign", nn.Softsign, (F.softsign,)),
    _activation("logsigmoid", nn.LogSigmoid, (F.logsigmoid,)),
    _activation("softshrink", nn.Softshrink, (F.softshrink,)),
    _activation("hardshrink", nn.Hardshrink, (F.hardshrink, torch.hardshrink), ("hardshrink",)),
    _activation("tanhshrink", nn.Tanhshrink, (F.tanhshrink,)),
    _activation("threshold", nn.Threshold, (F.threshold, torch.threshold, torch.threshold_)),
    Op("clamp", (), (torch.clamp, torch.clamp_, torch.clip, torch.clip_), ("clamp", "clamp_", "clip", "clip_"), True,
       pointwise=True, activation=_clamp, allocates=True, when=_clamps_to_interval),
    Op("prelu", (nn.PReLU, activations.PReLU), (F.prelu, torch.prelu), ("prelu",), channel_parameters=("weight",),
       pointwise=True, activation=nn.PReLU, allocates=True),
    Op("batch_norm", (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct), (F.batch_norm,),
       channel_parameters=NORM, allocates=True),
    Op("batch_norm_1d", (nn.BatchNorm1d,), channel_parameters=NORM, allocates=True),
    Op("instance_norm", (nn.InstanceNorm2d,), (F.instance_norm,), channel_parameters=NORM, allocates=True),
    _no_op("identity", (nn.Identity,)),
    _no_op("dropout", (nn.Dropout, nn.Dropout2d), (F.dropout, F.dropout2d), _is_off_in_eval(2, default=True)),
    _no_op("alpha_dropout", (nn.AlphaDropout, nn.FeatureAlphaDropout),
           (F.alpha_dropout, F.feature_alpha_dropout), _is_off_in_eval(2, default=False)),
    _no_op("stochastic_depth", (StochasticDepth,), (stochastic_depth,), _is_off_in_eval(3, default=True)),
    _no_op("drop_path", (DropPath,), (drop_path,), _is_off_in_eval(2, default=False)),
    _no_op("drop_block", (DropBlock2d,)),
    _pooling("max_pool", (nn.MaxPool2d, MaxPool2dSame), (F.max_pool2d, torch.max_pool2d)),
    _pooling("avg_pool", (nn.AvgPool2d, AvgPool2dSame), (F.avg_pool2d,)),
    _pooling("lp_pool", (nn.LPPool2d,), (F.lp_pool2d,)),
    _pooling("adaptive_avg_pool", (nn.AdaptiveAvgPool2d,), (F.adaptive_avg_pool2d,)),
    _pooling("adaptive_max_pool", (nn.AdaptiveMaxPool2d,), (F.adaptive_max_pool2d,)),
    _pooling("spatial_mean", (), (torch.mean,), ("mean",), _is_over_positions),
    _pooling("spatial_max", (), (torch.amax,), ("amax",), _is_over_positions),
    Op("upsample", (nn.Upsample,), (F.interpolate,), channel_independent=True),
    Op("pad", (nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d), (F.pad,),
       channel_independent=True, when=_pads_positions),
    Op("cast", (), (torch.clone, torch.detach),
       ("contiguous", "clone", "detach", "float", "half", "double", "bfloat16", "to"), True, pointwise=True),
    _unary("neg", (operator.neg, torch.neg), ("neg", "neg_")),
    _unary("abs", (builtins.abs, operator.abs, torch.abs), ("abs", "abs_")),
    _unary("exp", (torch.exp,), ("exp", "exp_")),
    _unary("log", (torch.log,), ("log", "log_")),
    _unary("sqrt", (torch.sqrt,), ("sqrt", "sqrt_")),
    _unary("rsqrt", (torch.rsqrt,), ("rsqrt", "rsqrt_")),
    _unary("square", (torch.square,), ("square", "square_")),
    _unary("reciprocal", (torch.reciprocal,), ("reciprocal", "reciprocal_")),
    _unary("pow", (operator.pow, torch.pow), ("pow", "pow_"), _has_constant_exponent),
    _binary("add", (operator.add, operator.iadd, torch.add), ("add", "add_")),
    _binary("sub", (operator.sub, operator.isub, torch.sub), ("sub", "sub_")),
    _binary("mul", (operator.mul, operator.imul, torch.mul), ("mul", "mul_")),
    _binary("div", (operator.truediv, operator.itruediv, torch.div), ("div", "div_")),
    _binary("maximum", (torch.maximum,), ("maximum",)),
    _binary("minimum", (torch.minimum,), ("minimum",)),
    Op("concat", (), (torch.cat, torch.concat, torch.concatenate), allocates=True),
    Op("flatten", (nn.Flatten,), (torch.flatten,), ("flatten",)),
    Op("reshape", (), (torch.reshape,), ("reshape", "view")),
    Op("squeeze", (), (torch.squeeze,), ("squeeze",)),
    Op("metadata", (), (torch.numel, torch.is_floating_point),
       ("size", "dim", "numel", "ndimension", "nelement", "stride", "is_contiguous", "is_floating_point")),
    Op("metadata", (), (getattr,), when=_is_metadata),
    Op("conv2d", (nn.Conv2d, Conv2dSame), (F.conv2d, torch.conv2d), allocates=True),
    Op("linear", (nn.Linear, Linear), (F.linear,), allocates=True),
)  # fmt: skip

_BY_MODULE = {module: op for op in OPS for module in op.modules}
_BY_FUNCTION: dict[Hashable, Op] = {function: op for op in OPS for function in op.functions}
_BY_METHOD: dict[Hashable, Op] = {method: op for op in OPS for method in op.methods}


def op_of(module: nn.Module, node: fx.Node) -> Op | None:
    """The operator that a node of `module`'s graph calls; None where it is not in the table."""
    return op_of_module(module.get_submodule(str(node.target))) if node.op == "call_module" else op_of_call(node)


def op_of_call(node: fx.Node) -> Op | None:
    """The operator that a node calls as a function or method; None where it is not in the table."""
    table = {"call_function": _BY_FUNCTION, "call_method": _BY_METHOD}.get(node.op, {})
    op = table.get(node.target)
    return op if op is not None and op.when(node) else None


def op_of_module(module: nn.Module) -> Op | None:
    """The operator of a module; None where it is not in the table or its forward is overridden."""
    listed = next((cls for cls in type(module).__mro__ if cls in _BY_MODULE), None)
    if listed is None or type(module).forward is not listed.forward or "forward" in vars(module):
        return None
    return _BY_MODULE[listed]
