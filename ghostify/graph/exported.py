"""Modules made by `torch.export` as ordinary traced modules, whose operators are those of `torch.nn.functional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ghostify.errors import GhostifyError
from ghostify.graph.methods import TracedModule

aten = torch.ops.aten
SAME_ARGUMENTS: dict[Any, Callable[..., Any]] = {
    aten.conv2d.default: F.conv2d,
    aten.conv2d.padding: F.conv2d,
    aten.linear.default: F.linear,
    aten.relu.default: F.relu,
    aten.relu_.default: F.relu,
    aten.silu.default: F.silu,
    aten.silu_.default: F.silu,
    aten.gelu.default: F.gelu,
    aten.hardswish.default: F.hardswish,
    aten.hardswish_.default: F.hardswish,
    aten.hardsigmoid.default: F.hardsigmoid,
    aten.hardtanh.default: F.hardtanh,
    aten.hardtanh_.default: F.hardtanh,
    aten.sigmoid.default: torch.sigmoid,
    aten.max_pool2d.default: torch.max_pool2d,
    aten.avg_pool2d.default: F.avg_pool2d,
    aten.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d,
    aten.dropout.default: F.dropout,
    aten.dropout_.default: F.dropout,
    aten.mean.dim: torch.mean,
    aten.cat.default: torch.cat,
    aten.flatten.using_ints: torch.flatten,
    aten.reshape.default: torch.reshape,
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: torch.add,
    aten.mul.Tensor: torch.mul,
}
IN_PLACE = {target for target in SAME_ARGUMENTS if target.overloadpacket.__name__.endswith("_")}
METHODS = {aten.view.default: "view", aten.permute.default: "permute", aten.transpose.int: "transpose"}


def is_exported(module: nn.Module) -> bool:
    """Whether the module was made by `torch.export`, from an exported program."""
    return isinstance(module, fx.GraphModule) and "_out_spec" in vars(module) and "_in_spec" in vars(module)


def as_traced_module(exported: nn.Module) -> fx.GraphModule:
    """An exported module as a traced one with the same parameters, without the checks of its inputs.

    Raises `GhostifyError` for a program in training mode, and for inputs that are not tensors.
    """
    assert isinstance(exported, fx.GraphModule)
    specs: Any = exported._in_spec
    if not all(child.is_leaf() for arguments in specs.children() for child in arguments.children()):
        raise GhostifyError(
            "the exported program: takes containers of tensors, which is not supported. Convert the model itself, "
            "then export it."
        )
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in exported.graph.nodes:
        if node.op == "output":
            outputs = pytree.tree_unflatten([copies[n] for n in node.args[0]], exported._out_spec)  # type: ignore[arg-type]
            graph.output(outputs)
        elif not _is_input_check(node):
            copies[node] = _copied(graph, node, copies)
    _move_inputs_first(graph)
    for node in [n for n in reversed(graph.nodes) if n.op == "get_attr" and not n.users]:
        graph.erase_node(node)
    return TracedModule(exported, graph, class_name="Exported").eval()


def _is_input_check(node: fx.Node) -> bool:
    return node.op == "call_module" and node.target == "_guards_fn"


def _copied(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """A copy of a node in `graph`, with the function of the same effect where there is one."""
    copied = graph.node_copy(node, copies.__getitem__)
    if node.target is aten.batch_norm.default:
        image, weight, bias, mean, variance, training, momentum, eps, _ = copied.args
        if training:
            raise GhostifyError(
                "the exported program: is in training mode. Call .eval() on the model before torch.export.export."
            )
        copied.target, copied.args = F.batch_norm, (image, mean, variance, weight, bias, training, momentum, eps)
    elif node.target in METHODS:
        copied.op, copied.target = "call_method", METHODS[node.target]
    elif node.target in SAME_ARGUMENTS and not (node.target in IN_PLACE and not _is_only_reader(node)):
        copied.target = SAME_ARGUMENTS[node.target]
    return copied


def _is_only_reader(node: fx.Node) -> bool:
    """Whether no other node reads the input that a node overwrites."""
    return isinstance(node.args[0], fx.Node) and len(node.args[0].users) == 1


def _move_inputs_first(graph: fx.Graph) -> None:
    first = next(iter(graph.nodes))
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if node is not first:
            first.prepend(node)
