"""ONNX files of small inference graphs, written node by node: an exporter is too slow for thousands of candidates."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.graph.op_queries import activation_input, activation_module, concat_inputs, elementwise_operands, is_add
from ghostify.graph.paths import called_module, resolve_attribute

OPSET = 18


def write_onnx(deployed: nn.Module, example: tuple[Any, ...], file: Path) -> bool:
    """Write an inference form that consists of convolutions, ReLU, sums, slices and concatenations as an ONNX file.

    `example` are the inputs, N x C x H x W; the file accepts their sizes only. Returns False, and writes nothing, for
    graphs with other nodes.
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
    """The ONNX nodes and constants of a graph, with the graph's names."""

    def __init__(self, module: fx.GraphModule, onnx: Any) -> None:
        self.module, self.onnx = module, onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[str] = []
        self.output = ""

    def append(self, node: fx.Node) -> bool:
        """Append a node; returns whether it can be written."""
        if node.op == "placeholder":
            self.inputs.append(node.name)
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                return False
            self.output = node.args[0].name
        elif isinstance(activation_module(self.module, node), nn.ReLU):
            return self._add(node, "Relu", [activation_input(self.module, node).name])
        elif node.op == "call_module":
            return self._append_module(node, called_module(self.module, node))
        elif node.op == "get_attr":
            self._constant(node.name, resolve_attribute(self.module, str(node.target)))
        else:
            return self._append_function(node)
        return True

    def _append_module(self, node: fx.Node, conv: nn.Module) -> bool:
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return False
        inputs = [node.all_input_nodes[0].name, self._constant(f"{node.name}_weight", conv.weight)]
        if conv.bias is not None:
            inputs.append(self._constant(f"{node.name}_bias", conv.bias))
        attributes: dict[str, Any] = {"strides": conv.stride, "dilations": conv.dilation, "group": conv.groups}
        return self._add(node, "Conv", inputs, pads=[*conv.padding, *conv.padding], **attributes)

    def _append_function(self, node: fx.Node) -> bool:
        args: tuple[Any, ...] = node.args
        if (concatenated := concat_inputs(node)) is not None:
            return self._add(node, "Concat", [n.name for n in concatenated], axis=1)
        if node.target is torch.narrow and not node.kwargs and args[1] == 1:
            bounds = {"start": args[2], "end": args[2] + args[3], "axis": 1}
            constants = [self._constant(f"{node.name}_{k}", torch.tensor([v])) for k, v in bounds.items()]
            return self._add(node, "Slice", [args[0].name, *constants])
        operands = elementwise_operands(node)
        return is_add(node) and operands is not None and self._add(node, "Add", [n.name for n in operands])

    def _add(self, node: fx.Node, op_type: str, inputs: list[str], **attributes: Any) -> bool:
        self.nodes.append(self.onnx.helper.make_node(op_type, inputs, [node.name], name=node.name, **attributes))
        return True

    def _constant(self, name: str, value: Tensor) -> str:
        """Append a constant; returns its name."""
        self.constants.append(self.onnx.numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name
