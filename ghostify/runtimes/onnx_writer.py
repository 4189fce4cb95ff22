"""Inference forms of a few layers as ONNX files, node by node: an exporter is too slow for thousands of candidates."""

from __future__ import annotations

import importlib
import operator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.graph.op_queries import activation_input, activation_module, concat_inputs, elementwise_operands, is_add
from ghostify.graph.program import called_module

OPSET = 18


def write_onnx(deployed: nn.Module, example: tuple[Any, ...], file: Path) -> bool:
    """Write an inference form of plain convolutions, ReLU, concatenation and the like as an ONNX file.

    Returns False, and writes nothing, for whatever has other nodes in it. Sizes are those of `example`.
    """
    if not isinstance(deployed, fx.GraphModule) or not all(isinstance(x, Tensor) and x.dim() == 4 for x in example):
        return False
    onnx = importlib.import_module("onnx")
    builder = _OnnxBuilder(deployed, onnx)
    if not all(builder.append(node) for node in deployed.graph.nodes):
        return False
    float32, helper = onnx.TensorProto.FLOAT, onnx.helper
    inputs = [
        helper.make_tensor_value_info(name, float32, list(x.shape))
        for name, x in zip(builder.inputs, example, strict=True)
    ]
    with torch.no_grad():
        shape = list(deployed(*example).shape)
    outputs = [helper.make_tensor_value_info(builder.output, float32, shape)]
    graph = helper.make_graph(builder.nodes, "layer", inputs, outputs, builder.constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), file)
    return True


class _OnnxBuilder:
    """ONNX nodes and constants of a graph, added one by one under the graph's own names."""

    def __init__(self, module: fx.GraphModule, onnx: Any) -> None:
        self.module, self.onnx = module, onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[str] = []
        self.output = ""

    def append(self, node: fx.Node) -> bool:
        """Whether the node could be written."""
        if node.op == "placeholder":
            self.inputs.append(node.name)
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                return False
            self.output = node.args[0].name
        elif isinstance(activation_module(self.module, node), nn.ReLU):
            return self._add(node, "Relu", [activation_input(self.module, node).name])
        elif node.op == "call_module":
            return self._module(node, called_module(self.module, node))
        elif node.op == "get_attr":
            self._constant(node.name, operator.attrgetter(str(node.target))(self.module))
        else:
            return self._function(node)
        return True

    def _module(self, node: fx.Node, inner: nn.Module) -> bool:
        if type(inner) is not nn.Conv2d or inner.padding_mode != "zeros" or isinstance(inner.padding, str):
            return False
        given = [node.all_input_nodes[0].name, self._constant(f"{node.name}_weight", inner.weight)]
        if inner.bias is not None:
            given.append(self._constant(f"{node.name}_bias", inner.bias))
        shape: dict[str, Any] = {"strides": inner.stride, "dilations": inner.dilation, "group": inner.groups}
        return self._add(node, "Conv", given, pads=[*inner.padding, *inner.padding], **shape)

    def _function(self, node: fx.Node) -> bool:
        args: tuple[Any, ...] = node.args
        if (joined := concat_inputs(node)) is not None:
            return self._add(node, "Concat", [n.name for n in joined], axis=1)
        if node.target is torch.narrow and not node.kwargs and args[1] == 1:
            bounds = {"start": args[2], "end": args[2] + args[3], "axis": 1}
            names = [self._constant(f"{node.name}_{k}", torch.tensor([v])) for k, v in bounds.items()]
            return self._add(node, "Slice", [args[0].name, *names])
        operands = elementwise_operands(node)
        return is_add(node) and operands is not None and self._add(node, "Add", [n.name for n in operands])

    def _add(self, node: fx.Node, kind: str, inputs: list[str], **attributes: Any) -> bool:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [node.name], name=node.name, **attributes))
        return True

    def _constant(self, name: str, value: Tensor) -> str:
        self.constants.append(self.onnx.numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name
