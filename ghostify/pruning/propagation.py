"""Channels on their way through a graph: where they go, what joins them, who uses them, what keeps them as they are."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

import timm.layers
from torch import Tensor, fx, nn

from ghostify.graph.functional_conv import as_conv_module, weight_path
from ghostify.graph.methods import method_marks
from ghostify.graph.op_queries import (
    channel_parameters,
    concat_inputs,
    elementwise_operands,
    is_channelwise,
    is_conv2d,
    is_depthwise,
    is_mul,
    is_standard_conv,
    reads_metadata,
)
from ghostify.graph.program import called_module
from ghostify.modules.hooks import has_hooks
from ghostify.pruning.channel_layout import ChannelLayout, names_channel_count, reads_channel_count, resampled, reshaped
from ghostify.pruning.channel_runs import ChannelRun, join_runs, pieces_of

STANDARD_LINEARS = (nn.Linear, timm.layers.Linear)


class Role(Enum):
    """What somebody has to do with channels."""

    PRODUCER = "makes them"
    PARAMETER = "has parameters for each of them"
    CONSUMER = "reads them"


@dataclass(frozen=True)
class Value:
    """The channels of a node's output, in order, and how they are laid out."""

    runs: tuple[ChannelRun, ...]
    layout: ChannelLayout

    @property
    def size(self) -> int:
        return sum(run.size for run in self.runs)


@dataclass(frozen=True)
class Use:
    """What the module or tensor at `path`, at a node, has to do with channels (see `Member`)."""

    role: Role
    node: fx.Node
    path: str
    value: Value
    width: int = 1
    rigid: str | None = None


class Propagation:
    """`values` of all nodes whose channels are known, and the `uses` of these channels, in the order of the graph.

    See `find_channel_groups` for the arguments.
    """

    def __init__(
        self, module: fx.GraphModule, sources: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.module, self.sources, self.shapes = module, sources, shapes
        self.values: dict[fx.Node, Value] = {}
        self.uses: list[Use] = []
        nodes = list(module.graph.nodes)
        self.calls = Counter(id(called_module(module, n)) for n in nodes if n.op == "call_module")
        self.holders = Counter(id(t) for m in module.modules() for t in (*m._parameters.values(), *m._buffers.values()))
        self.fetches = Counter(id(self._fetched(n)) for n in nodes if n.op == "get_attr")
        for node in nodes:
            value = self._visit(node)
            if value is not None:
                self.values[node] = value
                for method, _ in sorted(method_marks(node)):
                    self._fix([node], f"the method {method} begins or ends there")

    def _visit(self, node: fx.Node) -> Value | None:
        """The channels of a node's output, where they are known; what it does to those of its inputs is noted."""
        known = [n for n in node.all_input_nodes if n in self.values]
        if node.name in self.sources:
            self._fix(known, f"{_name(node)} reads them in the original's order")
            return Value((ChannelRun(self.sources[node.name]),), ChannelLayout())
        if node.op == "output":
            self._fix(known, "they reach the output")
            return None
        if is_conv2d(self.module, node):
            return self._convolved(node)
        if known and reads_metadata(node):
            if any(reads_channel_count(node, self.values[n].layout) for n in known):
                self._count(known, "their number is read")
            return None
        value = self._kept_apart(node) if known else None
        if value is None:
            inner = called_module(self.module, node) if node.op == "call_module" else None
            obstacle = None if inner is None else self._obstacle(inner, str(node.target))
            self._fix(known, obstacle or f"{_name(node)} may mix them")
        return value

    def _kept_apart(self, node: fx.Node) -> Value | None:
        """The channels of a node that keeps those of its inputs apart, None for any other."""
        rank = next(self.values[n].layout.rank for n in node.all_input_nodes if n in self.values)
        if (concatenated := concat_inputs(node, rank=rank)) is not None:
            return self._concatenated(concatenated)
        if (operands := elementwise_operands(node)) is not None and len(operands) == 2:
            return self._joined(node, operands)
        value = self.values.get(node.all_input_nodes[0])
        if value is None:
            return None
        if node.op == "call_module" and type(called_module(self.module, node)) in STANDARD_LINEARS:
            return self._linear(node, value)
        if (layout := reshaped(self.module, node, value.layout, self.shapes)) is not None:
            if names_channel_count(node):
                self._count([node.all_input_nodes[0]], f"{_name(node)} names their number")
            return Value(value.runs, layout)
        if not is_channelwise(self.module, node) or (layout := resampled(self.module, node, value.layout)) is None:
            return None
        paths = channel_parameters(self.module, node)
        return Value(value.runs, layout) if all(self._is_held(node, path, value) for path in paths) else None

    def _is_held(self, node: fx.Node, path: str, value: Value) -> bool:
        """Whether a tensor has one entry for each channel, and serves nobody else; its use is noted then."""
        owner, _, leaf = path.rpartition(".")
        inner = self.module.get_submodule(owner)
        tensor = inner._parameters.get(leaf, inner._buffers.get(leaf))
        alone = self.holders[id(tensor)] == 1 and self.fetches[id(tensor)] <= (node.op != "call_module")
        if node.op == "call_module":
            alone &= self.calls[id(called_module(self.module, node))] == 1
        if tensor is None or len(tensor) != value.size or not alone or value.layout.width != 1:
            return False
        self.uses.append(Use(Role.PARAMETER, node, path, value))
        return True

    def _convolved(self, node: fx.Node) -> Value | None:
        """The channels that a convolution makes; those that it reads are noted."""
        source = self.values.get(node.all_input_nodes[0])
        known = [n for n in node.all_input_nodes if n in self.values]
        if node.op != "call_module":
            self._fix(known, f"the function {_name(node)} reads them")
            path = weight_path(self.module, node)
            if path is None:
                return None
            return self._made(node, path, as_conv_module(self.module, node).out_channels, source, "it is a function")
        conv, path = called_module(self.module, node), str(node.target)
        assert isinstance(conv, nn.Conv2d)
        obstacle = self._obstacle(conv, path)
        if obstacle is None and is_standard_conv(conv):
            if is_depthwise(conv) and source is not None:
                self.uses.append(Use(Role.PARAMETER, node, path, source))
                return source
            if conv.groups == 1:
                if source is not None:
                    self.uses.append(Use(Role.CONSUMER, node, path, source))
                return self._made(node, path, conv.out_channels, source)
        rigid = "it convolves in groups" if is_standard_conv(conv) else "its class computes its weights"
        self._fix(known, obstacle or f"{path}: {rigid}")
        return self._made(node, path, conv.out_channels, source, rigid, obstacle)

    def _linear(self, node: fx.Node, value: Value) -> Value | None:
        """The channels that a linear layer makes of rows."""
        layer, path = called_module(self.module, node), str(node.target)
        assert isinstance(layer, nn.Linear)
        width, rest = divmod(layer.in_features, value.size)
        if value.layout.rank != 2 or rest or value.layout.width not in (None, width) or self._obstacle(layer, path):
            return None
        self.uses.append(Use(Role.CONSUMER, node, path, value, width))
        return self._made(node, path, layer.out_features, value)

    def _made(
        self,
        node: fx.Node,
        path: str,
        size: int,
        source: Value | None,
        rigid: str | None = None,
        fixed: str | None = None,
    ) -> Value:
        """New channels."""
        layout = ChannelLayout() if source is None else replace(source.layout, width=1)
        if len(self.shapes.get(node.name, (0,) * layout.rank)) != layout.rank:
            fixed = fixed or "they are of a single image, without a dimension for images"
        value = Value((ChannelRun(size, fixed),), layout)
        self.uses.append(Use(Role.PRODUCER, node, path, value, rigid=rigid))
        return value

    def _concatenated(self, nodes: tuple[fx.Node, ...]) -> Value | None:
        values = [self.values.get(node) for node in nodes]
        known = [value for value in values if value is not None]
        layouts = {value.layout for value in known}
        if len(known) < len(values) or len(layouts) != 1 or known[0].layout.width != 1:
            return None
        return Value(tuple(run for value in known for run in value.runs), known[0].layout)

    def _joined(self, node: fx.Node, operands: tuple[fx.Node, ...]) -> Value | None:
        """The channels of a sum, product or the like of two values."""
        known = [self.values[n] for n in operands if n in self.values]
        first, last = known[0], known[-1]
        if not all(n in self.values or self._is_single(n) for n in operands):
            return None
        if first.size != last.size or (first.layout.rank, first.layout.width) != (last.layout.rank, last.layout.width):
            return None
        if join_runs(first.runs, last.runs) and not is_mul(node):
            for piece in pieces_of(first.runs):
                piece.residual = True
        return Value(first.runs, replace(first.layout, pooled=first.layout.pooled and last.layout.pooled))

    def _is_single(self, node: fx.Node) -> bool:
        """Whether a node's value is known to be a single number."""
        fetched = self._fetched(node) if node.op == "get_attr" else None
        shape = tuple(fetched.shape) if isinstance(fetched, Tensor) else self.shapes.get(node.name)
        return shape is not None and math.prod(shape) == 1

    def _fetched(self, node: fx.Node) -> object:
        return operator.attrgetter(str(node.target))(self.module)

    def _obstacle(self, inner: nn.Module, path: str) -> str | None:
        """Why a module's weights must stay as they are."""
        if self.calls[id(inner)] > 1:
            return f"{path} is called several times"
        if has_hooks(inner):
            return f"{path} has hooks"
        shared = any(self.holders[id(p)] > 1 or self.fetches[id(p)] for p in inner.parameters(recurse=False))
        return f"{path} shares its weights" if shared else None

    def _fix(self, nodes: Iterable[fx.Node], reason: str) -> None:
        for piece in pieces_of(run for node in nodes for run in self.values[node].runs):
            piece.fixed = piece.fixed or reason

    def _count(self, nodes: Iterable[fx.Node], reason: str) -> None:
        for piece in pieces_of(run for node in nodes for run in self.values[node].runs):
            piece.counted = piece.counted or reason


def _name(node: fx.Node) -> str:
    """What a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
