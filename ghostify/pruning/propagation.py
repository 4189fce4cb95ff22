"""Propagation of channels through a graph: the channels of every node, what joins them, their uses and obstacles."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor, fx, nn

from ghostify.graph.functional_conv import as_conv_module, weight_path
from ghostify.graph.linear_layers import is_linear
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
    target_name,
)
from ghostify.graph.paths import called_module, resolve_attribute
from ghostify.modules.hooks import has_hooks
from ghostify.pruning import obstacles
from ghostify.pruning.channel_layout import (
    ChannelLayout,
    has_constant_channel_count,
    layout_after_resampling,
    layout_after_reshape,
    reads_channel_count,
)
from ghostify.pruning.channel_runs import ChannelRun, join_runs, pieces_of
from ghostify.pruning.divisions import is_channel_slice, part_sizes


class Role(Enum):
    """The role of a module or tensor for channels: it computes them, has parameters for each, or reads them."""

    PRODUCER = "producer"
    PARAMETER = "parameter"
    CONSUMER = "consumer"


@dataclass(frozen=True)
class NodeChannels:
    """The channels of a node's output, in order, and their layout."""

    runs: tuple[ChannelRun, ...]
    layout: ChannelLayout

    @property
    def size(self) -> int:
        return sum(run.size for run in self.runs)


@dataclass(frozen=True)
class ChannelUse:
    """The role of the module or tensor at `path`, called or fetched by a node, for channels (see `Member`)."""

    role: Role
    node: fx.Node
    path: str
    channels: NodeChannels
    width: int = 1
    weight_obstacle: str | None = None


class Propagation:
    """The `values` of all nodes whose channels are known, and the `uses` of these channels, in graph order.

    `parts` are those of nodes that divide channels (see `divisions`). `find_channel_groups` explains the arguments.
    """

    def __init__(
        self, module: fx.GraphModule, sources: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.module, self.sources, self.shapes = module, sources, shapes
        self.values: dict[fx.Node, NodeChannels] = {}
        self.parts: dict[fx.Node, tuple[NodeChannels, ...]] = {}
        self.uses: list[ChannelUse] = []
        nodes = list(module.graph.nodes)
        self.call_counts = Counter(id(called_module(module, n)) for n in nodes if n.op == "call_module")
        self.owner_counts = Counter(
            id(t) for m in module.modules() for t in (*m._parameters.values(), *m._buffers.values())
        )
        self.fetch_counts = Counter(id(self._attribute(n)) for n in nodes if n.op == "get_attr")
        for node in nodes:
            channels = self._visit(node)
            if channels is not None:
                self.values[node] = channels
            for method, _ in sorted(method_marks(node)) if node in self.values or node in self.parts else ():
                self._fix_order([node], obstacles.METHOD_BOUNDARY.format(method))

    def _visit(self, node: fx.Node) -> NodeChannels | None:
        """The channels of a node's output, where they are known; records the node's uses and obstacles."""
        known = [n for n in node.all_input_nodes if n in self.values]
        if any(n in self.parts and n not in self.values for n in node.all_input_nodes):
            return self._part(node)
        if node.name in self.sources:
            self._fix_order(known, obstacles.ORIGINAL_ORDER.format(_target_name(node)))
            return NodeChannels((ChannelRun(self.sources[node.name]),), ChannelLayout())
        if node.op == "output":
            self._fix_order(known, obstacles.REACH_OUTPUT)
            return None
        if is_conv2d(self.module, node):
            return self._convolution(node)
        if known and reads_metadata(node):
            if any(reads_channel_count(node, self.values[n].layout) for n in known):
                self._fix_count(known, obstacles.COUNT_READ)
            return None
        if (sizes := self._part_sizes(node)) is not None:
            return self._division(node, sizes)
        channels = self._channelwise(node) if known else None
        if channels is None:
            module = called_module(self.module, node) if node.op == "call_module" else None
            obstacle = None if module is None else self._weight_obstacle(module, str(node.target))
            self._fix_order(known, obstacle or obstacles.MIXED.format(_target_name(node)))
        return channels

    def _channelwise(self, node: fx.Node) -> NodeChannels | None:
        """The channels of a node that computes each from the inputs' channels one by one; None for any other node."""
        rank = next(self.values[n].layout.rank for n in node.all_input_nodes if n in self.values)
        if (concatenated := concat_inputs(node, rank=rank)) is not None:
            return self._concatenation(concatenated)
        if (operands := elementwise_operands(node)) is not None and len(operands) == 2:
            return self._elementwise(node, operands)
        source = self.values.get(node.all_input_nodes[0])
        if source is None:
            return None
        if is_linear(self.module, node):
            return self._linear(node, source)
        if (layout := layout_after_reshape(self.module, node, source.layout, self.shapes)) is not None:
            if has_constant_channel_count(node):
                self._fix_count([node.all_input_nodes[0]], obstacles.CONSTANT_COUNT.format(_target_name(node)))
            return NodeChannels(source.runs, layout)
        if not is_channelwise(self.module, node):
            return None
        if (layout := layout_after_resampling(self.module, node, source.layout)) is None:
            return None
        paths = channel_parameters(self.module, node)
        all_own = all(self._use_channel_tensor(node, path, source) for path in paths)
        return NodeChannels(source.runs, layout) if all_own else None

    def _part_sizes(self, node: fx.Node) -> tuple[int, ...] | None:
        """The sizes of the parts that a node divides known channels into, None for any other node."""
        source = self.values.get(node.all_input_nodes[0]) if len(node.all_input_nodes) == 1 else None
        if source is None or source.layout.width != 1:
            return None
        return part_sizes(node, source.size, source.layout.rank)

    def _division(self, node: fx.Node, sizes: tuple[int, ...]) -> NodeChannels | None:
        """Record the parts that a node divides channels into; returns the selected part of a slice."""
        source = self.values[node.all_input_nodes[0]]
        parts = [NodeChannels((ChannelRun(size),) if size else (), source.layout) for size in sizes]
        join_runs(source.runs, tuple(run for part in parts for run in part.runs))
        self.parts[node] = tuple(parts)
        return parts[1] if is_channel_slice(node) else None

    def _part(self, node: fx.Node) -> NodeChannels | None:
        """The part that a node selects of a divided tensor; any other use of the parts may mix them."""
        index = node.args[1] if node.target is operator.getitem else None
        if isinstance(index, int):
            return self.parts[node.all_input_nodes[0]][index]
        used = [n for n in node.all_input_nodes if n in self.values or n in self.parts]
        self._fix_order(
            used, obstacles.REACH_OUTPUT if node.op == "output" else obstacles.MIXED.format(_target_name(node))
        )
        return None

    def _use_channel_tensor(self, node: fx.Node, path: str, channels: NodeChannels) -> bool:
        """Record a tensor as parameter of channels; False if it has no entry per channel or is used elsewhere too."""
        owner_path, _, name = path.rpartition(".")
        owner = self.module.get_submodule(owner_path)
        tensor = owner._parameters.get(name, owner._buffers.get(name))
        unshared = self.owner_counts[id(tensor)] == 1 and self.fetch_counts[id(tensor)] <= (node.op != "call_module")
        if node.op == "call_module":
            unshared &= self.call_counts[id(called_module(self.module, node))] == 1
        if tensor is None or len(tensor) != channels.size or not unshared or channels.layout.width != 1:
            return False
        self.uses.append(ChannelUse(Role.PARAMETER, node, path, channels))
        return True

    def _convolution(self, node: fx.Node) -> NodeChannels | None:
        """The channels that a convolution computes; records its use of the channels that it reads."""
        source = self.values.get(node.all_input_nodes[0])
        known = [n for n in node.all_input_nodes if n in self.values]
        if node.op != "call_module":
            self._fix_order(known, obstacles.FUNCTION_INPUT.format(_target_name(node)))
            path = weight_path(self.module, node)
            if path is None:
                return None
            outputs = as_conv_module(self.module, node).out_channels
            return self._new_channels(node, path, outputs, source, obstacles.FUNCTION_WEIGHT.format(path))
        conv, path = called_module(self.module, node), str(node.target)
        assert isinstance(conv, nn.Conv2d)
        obstacle = self._weight_obstacle(conv, path)
        if obstacle is None and is_standard_conv(conv):
            if is_depthwise(conv) and source is not None:
                self.uses.append(ChannelUse(Role.PARAMETER, node, path, source))
                return source
            if conv.groups == 1:
                if source is not None:
                    self.uses.append(ChannelUse(Role.CONSUMER, node, path, source))
                return self._new_channels(node, path, conv.out_channels, source)
        reason = obstacles.GROUPED if is_standard_conv(conv) else obstacles.COMPUTED_WEIGHTS
        weight_obstacle = obstacle or reason.format(path)
        self._fix_order(known, weight_obstacle)
        return self._new_channels(node, path, conv.out_channels, source, weight_obstacle, obstacle)

    def _linear(self, node: fx.Node, source: NodeChannels) -> NodeChannels | None:
        """The channels that a linear layer computes from N x features."""
        layer, path = called_module(self.module, node), str(node.target)
        assert isinstance(layer, nn.Linear)
        layout = source.layout
        width, rest = divmod(layer.in_features, source.size)
        if layout.rank != 2 or rest or layout.width not in (None, width) or self._weight_obstacle(layer, path):
            return None
        self.uses.append(ChannelUse(Role.CONSUMER, node, path, source, width))
        return self._new_channels(node, path, layer.out_features, source)

    def _new_channels(
        self,
        node: fx.Node,
        path: str,
        size: int,
        source: NodeChannels | None,
        weight_obstacle: str | None = None,
        order_obstacle: str | None = None,
    ) -> NodeChannels:
        """The `size` channels that the module or weight at `path` computes, in the layout of its input."""
        layout = ChannelLayout() if source is None else replace(source.layout, width=1)
        if len(self.shapes.get(node.name, (0,) * layout.rank)) != layout.rank:
            order_obstacle = order_obstacle or obstacles.NO_BATCH
        channels = NodeChannels((ChannelRun(size, order_obstacle),), layout)
        self.uses.append(ChannelUse(Role.PRODUCER, node, path, channels, weight_obstacle=weight_obstacle))
        return channels

    def _concatenation(self, nodes: tuple[fx.Node, ...]) -> NodeChannels | None:
        values = [self.values.get(node) for node in nodes]
        known = [channels for channels in values if channels is not None]
        layouts = {channels.layout for channels in known}
        if len(known) < len(values) or len(layouts) != 1 or known[0].layout.width != 1:
            return None
        return NodeChannels(tuple(run for channels in known for run in channels.runs), known[0].layout)

    def _elementwise(self, node: fx.Node, operands: tuple[fx.Node, ...]) -> NodeChannels | None:
        """The channels of a sum, product or other elementwise function of two values."""
        known = [self.values[n] for n in operands if n in self.values]
        first, last = known[0], known[-1]
        if not all(n in self.values or self._is_scalar(n) for n in operands):
            return None
        if first.size != last.size or (first.layout.rank, first.layout.width) != (last.layout.rank, last.layout.width):
            return None
        if join_runs(first.runs, last.runs) and not is_mul(node):
            for piece in pieces_of(first.runs):
                piece.residual = True
        return NodeChannels(first.runs, replace(first.layout, pooled=first.layout.pooled and last.layout.pooled))

    def _is_scalar(self, node: fx.Node) -> bool:
        """Whether a node's value is known to be a single number."""
        attribute = self._attribute(node) if node.op == "get_attr" else None
        shape = tuple(attribute.shape) if isinstance(attribute, Tensor) else self.shapes.get(node.name)
        return shape is not None and math.prod(shape) == 1

    def _attribute(self, node: fx.Node) -> object:
        return resolve_attribute(self.module, str(node.target))

    def _weight_obstacle(self, module: nn.Module, path: str) -> str | None:
        """The reason why a module's weights must stay as they are, None if they can change."""
        if self.call_counts[id(module)] > 1:
            return obstacles.CALLED_REPEATEDLY.format(path)
        if has_hooks(module):
            return obstacles.HAS_HOOKS.format(path)
        parameters = module.parameters(recurse=False)
        shared = any(self.owner_counts[id(p)] > 1 or self.fetch_counts[id(p)] for p in parameters)
        return obstacles.SHARED_WEIGHTS.format(path) if shared else None

    def _fix_order(self, nodes: Iterable[fx.Node], reason: str) -> None:
        for piece in pieces_of(run for node in nodes for run in self._runs_of(node)):
            piece.order_obstacle = piece.order_obstacle or reason

    def _runs_of(self, node: fx.Node) -> tuple[ChannelRun, ...]:
        """The channels of a node, or of all its parts."""
        if node in self.values:
            return self.values[node].runs
        return tuple(run for part in self.parts[node] for run in part.runs)

    def _fix_count(self, nodes: Iterable[fx.Node], reason: str) -> None:
        for piece in pieces_of(run for node in nodes for run in self.values[node].runs):
            piece.count_obstacle = piece.count_obstacle or reason


def _target_name(node: fx.Node) -> str:
    """The name of the module, function or method that a node calls."""
    return target_name(node) or node.name
