"""Queries about the nodes of a graph, answered from the operator table."""

from __future__ import annotations

import operator

from timm.layers import Conv2dSame
from torch import Tensor, fx, nn

from ghostify.graph.ops import Op, argument, op_of, op_of_call, op_of_module
from ghostify.graph.paths import called_module, resolve_attribute
from ghostify.modules.hooks import has_hooks

IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
RANK = 4
SELF_GATED: dict[str, type[nn.Module]] = {"sigmoid": nn.SiLU, "hardsigmoid": nn.Hardswish}  # by the gate's operator


def is_conv2d(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node is a convolution: a call of a `Conv2d`, subclasses included, or of the function."""
    if node.op == "call_module":
        return isinstance(called_module(module, node), nn.Conv2d)
    return is_conv2d_function(node)


def is_conv2d_function(node: fx.Node) -> bool:
    """Whether the node calls conv2d as a function."""
    return node.op == "call_function" and _op_name(op_of_call(node)) == "conv2d"


def is_standard_conv(conv: nn.Module) -> bool:
    """Whether a module is of class `Conv2d` or timm's `Conv2dSame`, not of a subclass, with its class's forward."""
    return type(conv) in (nn.Conv2d, Conv2dSame) and "forward" not in vars(conv)


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether each output channel depends on the input channel of the same index only."""
    return conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1


def activation_module(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """A module that computes what an activation node does; None for any other node and for modules with hooks.

    It is the called module of a `call_module` node, and a new, not in-place one for other calls; a new PReLU shares the
    graph's weight. `x * sigmoid(x)` and `x * hardsigmoid(x)` are activations of x (see `activation_input`).
    """
    if node.op == "call_module":
        inner = called_module(module, node)
        return inner if is_activation_module(inner) else None
    if (self_gated := _self_gated(module, node)) is not None:
        return self_gated[1]
    op = op_of_call(node)
    if op is None or op.activation is None:
        return None
    if op.activation is nn.PReLU:
        return _prelu(module, node)
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("input", "inplace")}
    values = [*node.args[1:], *kwargs.values()]
    if any(isinstance(v, fx.Node) for v in values):
        return None
    activation = op.activation(*node.args[1:], **kwargs)
    if hasattr(activation, "inplace"):
        setattr(activation, "inplace", False)  # noqa: B010
    return activation


def is_activation_module(module: nn.Module) -> bool:
    """Whether a module is an activation without hooks."""
    op = op_of_module(module)
    return op is not None and op.activation is not None and not has_hooks(module)


def activation_input(module: nn.Module, node: fx.Node) -> fx.Node:
    """The input node of an activation node."""
    self_gated = _self_gated(module, node)
    source = argument(node, 0, "input") if self_gated is None else self_gated[0]
    assert isinstance(source, fx.Node)
    return source


def _self_gated(module: nn.Module, node: fx.Node) -> tuple[fx.Node, nn.Module] | None:
    """x and the activation, where the node multiplies x by a gate that depends on x only."""
    operands = elementwise_operands(node) if is_mul(node) else None
    for gate, source in (operands, operands[::-1]) if operands is not None else ():
        activation = SELF_GATED.get(_op_name(op_of(module, gate)) or "")
        if activation is None or len(gate.users) != 1 or activation_module(module, gate) is None:
            continue
        if argument(gate, 0, "input") is source and not _may_write(module, gate):
            return source, activation()
    return None


def _prelu(module: nn.Module, node: fx.Node) -> nn.Module | None:
    source = argument(node, 1, "weight")
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    weight = resolve_attribute(module, str(source.target))
    if not isinstance(weight, nn.Parameter):
        return None
    activation = nn.PReLU(weight.numel(), device="meta")
    activation.weight = weight
    return activation


def is_identity_in_eval(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node returns its input unchanged in evaluation, and calls no module with hooks."""
    op = op_of(module, node)
    is_hooked = node.op == "call_module" and has_hooks(called_module(module, node))
    return op is not None and op.identity_in_eval and not is_hooked


def is_channel_independent(module: nn.Module, node: fx.Node) -> bool:
    """Whether every output channel is the same function of the input channel of the same index.

    True for an operation of a tensor and a number. False for an operation of two tensors (`elementwise_operands`), for
    operators with parameters per channel (`is_channelwise`) and for modules with hooks.
    """
    return is_channelwise(module, node) and not channel_parameters(module, node)


def is_channelwise(module: nn.Module, node: fx.Node) -> bool:
    """Whether every output channel depends on the input channel of the same index and that channel's parameters only.

    `channel_parameters` names the parameters. False for means over all positions that drop the dimensions
    and for depthwise convolutions (`is_depthwise`).
    """
    if node.op == "call_module":
        return is_channelwise_module(called_module(module, node))
    op = op_of_call(node)
    if op is None or _drops_positions(node):
        return False
    if op.binary:
        return len(elementwise_operands(node) or ()) == 1
    return op.channel_independent or (bool(op.channel_parameters) and _parameters_are_attributes(node))


def is_channelwise_module(module: nn.Module) -> bool:
    """`is_channelwise` of any call of a module, and of its submodules, such as a norm's activation."""
    op = op_of_module(module)
    is_self_channelwise = (
        op is not None and (op.channel_independent or bool(op.channel_parameters)) and not has_hooks(module)
    )
    return is_self_channelwise and all(is_channelwise_module(child) for child in module.children())


def channel_parameters(module: nn.Module, node: fx.Node) -> tuple[str, ...]:
    """Paths in `module` of the parameters and buffers that have one entry per channel of a channelwise node.

    Removing or permuting the node's channels must slice or permute them too, along their first dimension.
    """
    if node.op != "call_module":
        op = op_of_call(node)
        attributes = _attribute_arguments(node) if op is not None and op.channel_parameters else ()
        return tuple(path for path in attributes if _has_channels(resolve_attribute(module, path)))
    return tuple(f"{node.target}.{path}" for path in _channel_parameters(called_module(module, node)))


def _channel_parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(
        f"{path}.{name}" if path else name for path, inner in module.named_modules() for name in channel_tensors(inner)
    )


def channel_tensors(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's direct parameters and buffers that have one entry per channel, as in `channel_parameters`."""
    op = op_of_module(module)
    return () if op is None else tuple(n for n in op.channel_parameters if _has_channels(getattr(module, n)))


def _parameters_are_attributes(node: fx.Node) -> bool:
    return len(_attribute_arguments(node)) == len(node.all_input_nodes) - 1


def _attribute_arguments(node: fx.Node) -> tuple[str, ...]:
    return tuple(str(n.target) for n in node.all_input_nodes[1:] if n.op == "get_attr")


def _has_channels(value: Tensor | None) -> bool:
    """False for a tensor of one value, which all channels share."""
    return value is not None and value.numel() > 1


def elementwise_operands(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The operands of an addition, multiplication or similar operation that are nodes; None for any other node.

    Where only one operand is a node, the other is a number.
    """
    op = op_of_call(node)
    if op is None or not op.binary:
        return None
    operands = argument(node, 0, "input"), argument(node, 1, "other")
    nodes = tuple(value for value in operands if isinstance(value, fx.Node))
    numbers = sum(isinstance(value, int | float) for value in operands)
    return nodes if nodes and len(nodes) + numbers == len(operands) else None


def is_add(node: fx.Node) -> bool:
    """Whether the node is the unscaled sum of two nodes' values."""
    return _is_binary(node, "add")


def is_mul(node: fx.Node) -> bool:
    """Whether the node is the product of two nodes' values."""
    return _is_binary(node, "mul")


def _is_binary(node: fx.Node, name: str) -> bool:
    is_unscaled = _op_name(op_of_call(node)) == name and not set(node.kwargs) - {"input", "other"}
    return is_unscaled and len(elementwise_operands(node) or ()) == 2


def is_concat(node: fx.Node) -> bool:
    """Whether the node is a concatenation along any dimension."""
    return _op_name(op_of_call(node)) == "concat"


def concat_inputs(node: fx.Node, dim: int = 1, rank: int = RANK) -> tuple[fx.Node, ...] | None:
    """The inputs of a concatenation along `dim` of tensors of `rank` dimensions, in order; None for any other node."""
    tensors = argument(node, 0, "tensors") if is_concat(node) else None
    node_dim = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    if not isinstance(tensors, list | tuple) or not isinstance(node_dim, int) or node_dim % rank != dim % rank:
        return None
    nodes = tuple(value for value in tensors if isinstance(value, fx.Node))
    return nodes if len(nodes) == len(tensors) else None


def is_pooling(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node pools each channel over positions."""
    op = op_of(module, node)
    return op is not None and op.pools


def is_resampling(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node pools or upsamples each channel."""
    return is_pooling(module, node) or _op_name(op_of(module, node)) == "upsample"


def _drops_positions(node: fx.Node) -> bool:
    """Whether the node reduces over all positions and drops their dimensions."""
    return _op_name(op_of_call(node)) in ("spatial_mean", "spatial_max") and not argument(node, 2, "keepdim", False)


def reads_metadata(node: fx.Node) -> bool:
    """Whether the node only reads metadata of a tensor, such as its shape, dtype or device."""
    return _op_name(op_of_call(node)) == "metadata"


def target_name(node: fx.Node) -> str:
    """The name of the module, function or method that the node calls; empty for a function without a name."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def may_mutate_input(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node may write to an input, or return a view of one, which a later node may write to."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    op = op_of(module, node)
    return op is None or not op.allocates or _may_write(module, node)


def _may_write(module: nn.Module, node: fx.Node) -> bool:
    """Whether a known operator is called in its in-place form."""
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) or has_hooks(m) for m in called_module(module, node).modules())
    name = target_name(node)
    in_place = name.endswith("_") or node.target in IN_PLACE or "out" in node.kwargs
    op = op_of_call(node)
    is_set_in_place = op is not None and op.activation is not None and any(value is True for value in node.args[1:])
    return in_place or is_set_in_place or bool(node.kwargs.get("inplace"))


def _op_name(op: Op | None) -> str | None:
    return None if op is None else op.name
