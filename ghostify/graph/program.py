"""A traced copy of a model: its subgraphs, and every call of every two-dimensional convolution in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ghostify.arguments import instance_of
from ghostify.graph.conv_types import to_standard_conv
from ghostify.graph.functional_conv import as_conv_module, weight_path
from ghostify.graph.linear_layers import linear_as_conv

Shape = tuple[int, ...]
SINGLE_CONV_NAME = "conv"
FUNCTIONAL_CONV = "conv2d"


@dataclass(frozen=True)
class ConvCall:
    """One call of a convolution: its graph node, and its N x C x H x W shapes where example inputs were given.

    `output_positions` is the number of output positions over all images and all runs of the node.
    """

    node: str
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    output_positions: int | None = None


@dataclass(frozen=True)
class Convolution:
    """A two-dimensional convolution of the model, or a linear layer as a 1 x 1 convolution, with all its calls.

    `name` is the module's path, or the path of the weight for `torch.nn.functional.conv2d`; `subgraph_path` is the path
    of the subgraph that calls it. `conv_class` is the class name, or "conv2d" for the function. `unsupported_reason`
    says why it cannot be rewritten, None where it can.
    """

    name: str
    conv_class: str
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    groups: int
    bias: bool
    calls: tuple[ConvCall, ...]
    unsupported_reason: str | None = None
    subgraph_path: str = ""

    @property
    def is_functional(self) -> bool:
        """Whether it is a call of `torch.nn.functional.conv2d`, not of a module."""
        return self.conv_class == FUNCTIONAL_CONV

    @property
    def macs_per_output(self) -> int:
        """MACs of one output value."""
        return self.inputs // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def local_path(self) -> str:
        """Its path within its subgraph."""
        if self.subgraph_path == self.name:
            return SINGLE_CONV_NAME
        return self.name.removeprefix(f"{self.subgraph_path}.") if self.subgraph_path else self.name


@dataclass(frozen=True, eq=False)
class Program:
    """A traced copy of the caller's model, read-only for later stages.

    `macs` counts one forward of `example`, the example inputs. `missing_attributes` names the public attributes and
    methods of the model that the copy lacks. `subgraphs` maps module paths to traced modules, inner ones before outer
    ones. Where the whole model traces, the last one is `module` itself, with the path ""; else `module` keeps the
    model's class and contains the subgraphs. A convolution called by a forward without a graph is a subgraph by itself.
    `linear_layers` are those that the subgraphs call, as 1 x 1 convolutions of maps with one position.
    """

    module: nn.Module
    subgraphs: Mapping[str, fx.GraphModule]
    convolutions: tuple[Convolution, ...]
    macs: int | None = None
    missing_attributes: tuple[str, ...] = ()
    example: Any = None
    linear_layers: tuple[Convolution, ...] = ()

    def conv(self, name: str) -> nn.Conv2d:
        """The convolution or linear layer `name` as a standard convolution; shares its parameters where possible."""
        conv = next(c for c in (*self.convolutions, *self.linear_layers) if c.name == name)
        return conv_module(self.subgraphs[conv.subgraph_path], conv.local_path)


a_program = instance_of(Program, "Pass what trace(model) returns.")


def conv_module(module: fx.GraphModule, name: str) -> nn.Conv2d:
    """The convolution `name` of a traced module as a standard module.

    It is the convolution itself, the standard equivalent of its class, or a `Conv2d` with the parameters of a
    functional call or of a linear layer.
    """
    try:
        conv = module.get_submodule(name)
    except AttributeError:
        return as_conv_module(module, next(n for n in module.graph.nodes if weight_path(module, n) == name))
    if isinstance(conv, nn.Linear):
        return linear_as_conv(conv)
    assert isinstance(conv, nn.Conv2d)
    standard = to_standard_conv(conv)
    assert isinstance(standard, nn.Conv2d)
    return standard


def single_conv_graph(conv: nn.Conv2d) -> fx.GraphModule:
    """A graph that only calls the convolution."""
    graph = fx.Graph()
    graph.output(graph.call_module(SINGLE_CONV_NAME, (graph.placeholder("input"),)))
    return fx.GraphModule({SINGLE_CONV_NAME: conv}, graph).train(conv.training)


def get_subgraph(module: nn.Module, path: str) -> fx.GraphModule:
    """The subgraph at `path` of a copy of a program's module."""
    inner = module.get_submodule(path)
    return inner if isinstance(inner, fx.GraphModule) else single_conv_graph(inner)  # type: ignore[arg-type]


def set_subgraph(module: nn.Module, path: str, subgraph: fx.GraphModule) -> None:
    """Store a changed single convolution at its path in `module`, in place; any other is in `module` already."""
    if not isinstance(module.get_submodule(path), fx.GraphModule):
        module.set_submodule(path, subgraph.get_submodule(SINGLE_CONV_NAME))
