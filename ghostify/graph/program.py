"""A traced copy of a model: its parts, each with a graph, and every use of every `Conv2d` in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ghostify.graph.conv_types import plain
from ghostify.graph.functional_conv import functional_conv, functional_weight

Shape = tuple[int, ...]
LONE = "conv"


@dataclass(frozen=True)
class Call:
    """One use of a convolution: its graph node, and N x C x H x W shapes where example inputs were given.

    `places` counts the output positions over all images, each time the node ran.
    """

    node: str
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    places: int | None = None


@dataclass(frozen=True)
class Convolution:
    """A two-dimensional convolution of the model, with every call of it.

    `name` is the module's path, or the path of the weight for `torch.nn.functional.conv2d`; `part` the path of the part
    whose graph calls it. `kind` is the class name, or "conv2d" for the function. `obstacle` says why it cannot be taken
    apart, if it cannot.
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    groups: int
    bias: bool
    calls: tuple[Call, ...]
    obstacle: str | None = None
    part: str = ""

    @property
    def taps(self) -> int:
        """Multiply-accumulates for one output value."""
        return self.inputs // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def local(self) -> str:
        """Its path within its part."""
        if self.part == self.name:
            return LONE
        return self.name.removeprefix(f"{self.part}.") if self.part else self.name


@dataclass(frozen=True, eq=False)
class Program:
    """A traced copy of the caller's model; read-only from here on. `macs` counts one forward of `example`, the
    example inputs; `lost` names what the model has beside its forward, and the copy has not.

    `parts` has the graphs by the paths of the modules they are of, inner ones before outer ones. Where the whole model
    traces, the last is `module` itself, under the path ""; else the model's class stays, around the parts. A
    convolution that a forward without a graph calls is a part of its own.
    """

    module: nn.Module
    parts: Mapping[str, fx.GraphModule]
    convolutions: tuple[Convolution, ...]
    macs: int | None = None
    lost: tuple[str, ...] = ()
    example: Any = None

    def conv(self, name: str) -> nn.Conv2d:
        """The convolution `name` as a plain module; it shares the program's parameters where it is one there."""
        found = next(c for c in self.convolutions if c.name == name)
        return as_module(self.parts[found.part], found.local)


def called(module: nn.Module, node: fx.Node) -> nn.Module:
    """The submodule that a `call_module` node calls."""
    return module.get_submodule(str(node.target))


def as_module(module: fx.GraphModule, name: str) -> nn.Conv2d:
    """The convolution called `name` in a traced module as a plain one: itself, what its class amounts to, or a `Conv2d`
    around a functional call's parameters."""
    try:
        found = module.get_submodule(name)
    except AttributeError:
        return functional_conv(module, next(n for n in module.graph.nodes if functional_weight(module, n) == name))
    assert isinstance(found, nn.Conv2d)
    made = plain(found)
    assert isinstance(made, nn.Conv2d)
    return made


def lone(conv: nn.Conv2d) -> fx.GraphModule:
    """A graph that only calls the convolution."""
    graph = fx.Graph()
    graph.output(graph.call_module(LONE, (graph.placeholder("input"),)))
    return fx.GraphModule({LONE: conv}, graph).train(conv.training)


def part_of(module: nn.Module, path: str) -> fx.GraphModule:
    """The part at `path` of a copy of a program's module."""
    found = module.get_submodule(path)
    return found if isinstance(found, fx.GraphModule) else lone(found)  # type: ignore[arg-type]


def put_part(module: nn.Module, path: str, part: fx.GraphModule) -> None:
    """Put a part that was changed back to its place in `module`, in place."""
    if not isinstance(module.get_submodule(path), fx.GraphModule):
        module.set_submodule(path, part.get_submodule(LONE))
