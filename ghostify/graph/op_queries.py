"""Questions about the nodes of a graph, answered by the table of operators."""

from __future__ import annotations

import math
import operator
from typing import Any

from timm.layers import Conv2dSame
from torch import Tensor, fx, nn

from ghostify.graph.ops import argument, op_of, op_of_call, op_of_module
from ghostify.modules.hooks import has_hooks

IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
RANK = 4


def is_conv2d(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node is a convolution: a call of any `Conv2d`, its subclasses included, or of the function."""
    if node.op == "call_module":
        return isinstance(_called(module, node), nn.Conv2d)
    return is_conv2d_function(node)


def is_conv2d_function(node: fx.Node) -> bool:
    """Whether the node calls conv2d as a function."""
    return node.op == "call_function" and _name(op_of_call(node)) == "conv2d"


def is_standard_conv(conv: nn.Module) -> bool:
    """Whether it is `Conv2d` itself, or timm's `Conv2dSame`, and no subclass that computes something else."""
    return type(conv) in (nn.Conv2d, Conv2dSame)


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether each output channel is made of the same input channel alone."""
    return conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1


def activation_module(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """A module that computes what an activation node does, None for any other node and where hooks run.

    Of a `call_module` node its module; of other calls a new one that does not write in place, PReLU's with the graph's
    own weight. `x * sigmoid(x)` and its like are activations of x (see `activation_input`).
    """
    if node.op == "call_module":
        inner = _called(module, node)
        return inner if is_activation_module(inner) else None
    if (gate := _own_gate(module, node)) is not None:
        return gate[1]
    op = op_of_call(node)
    if op is None or op.activation is None:
        return None
    if op.activation is nn.PReLU:
        return _prelu(module, node)
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("input", "inplace")}
    values = [*node.args[1:], *kwargs.values()]
    if any(isinstance(v, fx.Node) for v in values):
        return None
    made = op.activation(*node.args[1:], **kwargs)
    if hasattr(made, "inplace"):
        setattr(made, "inplace", False)  # noqa: B010
    return made


def is_activation_module(module: nn.Module) -> bool:
    """Whether a module is an activation, and runs no hooks."""
    op = op_of_module(module)
    return op is not None and op.activation is not None and not has_hooks(module)


def activation_input(module: nn.Module, node: fx.Node) -> fx.Node:
    """The node that an activation node activates."""
    gate = _own_gate(module, node)
    source = argument(node, 0, "input") if gate is None else gate[0]
    assert isinstance(source, fx.Node)
    return source


def _own_gate(module: nn.Module, node: fx.Node) -> tuple[fx.Node, nn.Module] | None:
    """x and the activation that multiplies x by a gate made of x alone, where the node is such a product."""
    operands = elementwise_operands(node) if is_mul(node) else None
    for gate, source in (operands, operands[::-1]) if operands is not None else ():
        made = {"sigmoid": nn.SiLU, "hardsigmoid": nn.Hardswish}.get(_name(op_of(module, gate)) or "")
        alone = made is not None and len(gate.users) == 1 and activation_module(module, gate) is not None
        if made is not None and alone and argument(gate, 0, "input") is source and not _may_write(module, gate):
            return source, made()
    return None


def _prelu(module: nn.Module, node: fx.Node) -> nn.Module | None:
    source = argument(node, 1, "weight")
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    weight = operator.attrgetter(str(source.target))(module)
    if not isinstance(weight, nn.Parameter):
        return None
    made = nn.PReLU(weight.numel(), device="meta")
    made.weight = weight
    return made


def is_identity_in_eval(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node returns its input unchanged in evaluation, and no hook runs."""
    op = op_of(module, node)
    hooked = node.op == "call_module" and has_hooks(_called(module, node))
    return op is not None and op.identity_in_eval and not hooked


def is_channel_independent(module: nn.Module, node: fx.Node) -> bool:
    """Whether every output channel is made of the same input channel, in the same way for all channels.

    An operation of a tensor with a number is; that of two tensors is not, see `elementwise_operands`; nor is what has
    parameters of its own for each channel, see `is_channelwise`, nor what runs hooks.
    """
    return is_channelwise(module, node) and not channel_parameters(module, node)


def is_channelwise(module: nn.Module, node: fx.Node) -> bool:
    """Whether every output channel is made of the same input channel, by parameters of that channel if there are any.

    `channel_parameters` names these. Means over all positions that drop the dimensions are left to
    `flattens_channels`, depthwise convolutions to `is_depthwise`.
    """
    if node.op == "call_module":
        return is_channelwise_module(_called(module, node))
    op = op_of_call(node)
    if op is None or _drops_positions(node):
        return False
    if op.binary:
        return len(elementwise_operands(node) or ()) == 1
    return op.channel_independent or (bool(op.channel_parameters) and _parameters_are_attributes(node))


def is_channel_independent_module(module: nn.Module) -> bool:
    """`is_channel_independent` of any call of a module."""
    return is_channelwise_module(module) and not _channel_parameters(module)


def is_channelwise_module(module: nn.Module) -> bool:
    """`is_channelwise` of any call of a module: of it, and of what it holds, such as a norm's activation."""
    op = op_of_module(module)
    own = op is not None and (op.channel_independent or bool(op.channel_parameters)) and not has_hooks(module)
    return own and all(is_channelwise_module(child) for child in module.children())


def channel_parameters(module: nn.Module, node: fx.Node) -> tuple[str, ...]:
    """Paths in `module` of the parameters and buffers that have one entry for each channel of a channelwise node.

    Whoever removes or permutes its channels does the same to them, along their first dimension.
    """
    if node.op != "call_module":
        op = op_of_call(node)
        attributes = _attribute_arguments(node) if op is not None and op.channel_parameters else ()
        return tuple(path for path in attributes if _has_channels(operator.attrgetter(path)(module)))
    return tuple(f"{node.target}.{path}" for path in _channel_parameters(_called(module, node)))


def _channel_parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(
        f"{path}.{name}" if path else name for path, inner in module.named_modules() for name in channel_tensors(inner)
    )


def channel_tensors(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's own parameters and buffers that have one entry for each channel, as `channel_parameters`."""
    op = op_of_module(module)
    return () if op is None else tuple(n for n in op.channel_parameters if _has_channels(getattr(module, n)))


def _parameters_are_attributes(node: fx.Node) -> bool:
    return len(_attribute_arguments(node)) == len(node.all_input_nodes) - 1


def _attribute_arguments(node: fx.Node) -> tuple[str, ...]:
    return tuple(str(n.target) for n in node.all_input_nodes[1:] if n.op == "get_attr")


def _has_channels(value: Tensor | None) -> bool:
    """One value serves all channels."""
    return value is not None and value.numel() > 1


def elementwise_operands(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The nodes among the two operands of an addition, multiplication or the like, None for any other node.

    The other operand, if only one is a node, is a number.
    """
    op = op_of_call(node)
    if op is None or not op.binary:
        return None
    operands = argument(node, 0, "input"), argument(node, 1, "other")
    nodes = tuple(value for value in operands if isinstance(value, fx.Node))
    numbers = sum(isinstance(value, int | float) for value in operands)
    return nodes if nodes and len(nodes) + numbers == len(operands) else None


def is_add(node: fx.Node) -> bool:
    """Whether the node is the plain sum of two nodes' values."""
    return _is_binary(node, "add")


def is_mul(node: fx.Node) -> bool:
    """Whether the node is the product of two nodes' values."""
    return _is_binary(node, "mul")


def _is_binary(node: fx.Node, name: str) -> bool:
    plain = _name(op_of_call(node)) == name and not set(node.kwargs) - {"input", "other"}
    return plain and len(elementwise_operands(node) or ()) == 2


def is_concat(node: fx.Node) -> bool:
    """Whether the node concatenates, along whatever dimension."""
    return _name(op_of_call(node)) == "concat"


def concat_inputs(node: fx.Node, dim: int = 1, rank: int = RANK) -> tuple[fx.Node, ...] | None:
    """What the node concatenates along `dim` of tensors of that rank, in order; None for any other node."""
    tensors = argument(node, 0, "tensors") if is_concat(node) else None
    along = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    if not isinstance(tensors, list | tuple) or not isinstance(along, int) or along % rank != dim % rank:
        return None
    nodes = tuple(value for value in tensors if isinstance(value, fx.Node))
    return nodes if len(nodes) == len(tensors) else None


def is_pooling(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node pools each channel over positions."""
    op = op_of(module, node)
    return op is not None and op.pools


def is_resampling(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node pools each channel, or enlarges it."""
    return is_pooling(module, node) or _name(op_of(module, node)) == "upsample"


def is_spatial_mean(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node averages each channel over all positions, with or without dropping the dimensions."""
    name = _name(op_of(module, node))
    if name != "adaptive_avg_pool":
        return name == "spatial_mean"
    inner: Any = _called(module, node) if node.op == "call_module" else None
    size = argument(node, 1, "output_size") if inner is None else inner.output_size
    return size == 1 or (isinstance(size, list | tuple) and tuple(size) == (1, 1))


def flattens_channels(module: nn.Module, node: fx.Node, shape_in: tuple[int, ...], shape_out: tuple[int, ...]) -> bool:
    """Whether N x C x H x W becomes rows in the order of the channels, N x C*H*W, or N x C by pooling all positions."""
    op = op_of(module, node)
    if op is None or len(shape_in) != RANK or len(shape_out) != 2:
        return False
    if _drops_positions(node):
        return True
    return op.name in ("flatten", "reshape", "squeeze") and shape_out == (shape_in[0], math.prod(shape_in[1:]))


def _drops_positions(node: fx.Node) -> bool:
    """Whether it reduces over all positions and keeps no dimensions of size one in their place."""
    return _name(op_of_call(node)) in ("spatial_mean", "spatial_max") and not argument(node, 2, "keepdim", False)


def reads_metadata(node: fx.Node) -> bool:
    """Whether the node only reads a tensor's shape, type, device or the like."""
    return _name(op_of_call(node)) == "metadata"


def may_mutate_input(module: nn.Module, node: fx.Node) -> bool:
    """Whether running the node might write into one of its inputs, or return memory of one that is written later."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    op = op_of(module, node)
    return op is None or not op.allocates or _may_write(module, node)


def _may_write(module: nn.Module, node: fx.Node) -> bool:
    """Whether a known operator is spelled or set to write in place."""
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) or has_hooks(m) for m in _called(module, node).modules())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or node.target in IN_PLACE or "out" in node.kwargs
    op = op_of_call(node)
    told = op is not None and op.activation is not None and any(value is True for value in node.args[1:])
    return in_place or told or bool(node.kwargs.get("inplace"))


def _called(module: nn.Module, node: fx.Node) -> nn.Module:
    return module.get_submodule(str(node.target))


def _name(op: Any) -> str | None:
    return None if op is None else op.name
