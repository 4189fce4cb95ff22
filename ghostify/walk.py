"""Original and converted graph side by side: every node runs once per calibration batch, only live values are kept."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from ghostify.errors import GhostifyError
from ghostify.trace import as_arguments, bind_inputs, called

Env = dict[fx.Node, Any]
READ_ONLY = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


@dataclass(eq=False)
class Chunk:
    """One calibration batch on its way: its images' numbers, and the values that later nodes still read.

    `converted` holds only the values that differ from the original's.
    """

    number: int
    first: int
    size: int
    inputs: list[Any]
    original: Env = field(default_factory=dict)
    converted: Env = field(default_factory=dict)

    def value(self, node: fx.Node) -> Any:
        """The node's value in the converted model."""
        return self.converted[node] if node in self.converted else self.original[node]


class Walk:
    """Steps through the graph of `module` with a copy of it that the caller converts on the way.

    `changed` names the nodes whose module the caller is going to replace or change.
    """

    def __init__(self, module: fx.GraphModule, chunks: list[Chunk], changed: set[str]) -> None:
        self.original = copy.deepcopy(module).eval()
        self.converted = copy.deepcopy(module).eval()
        self.chunks, self.changed = chunks, changed
        self.images = sum(c.size for c in chunks)

    def node(self, name: str | None) -> fx.Node | None:
        """The original's node of that name."""
        return next((n for n in self.original.graph.nodes if n.name == name), None)

    def steps(self) -> Iterator[fx.Node]:
        """Yield each node after the original has run it and before the converted model does."""
        twins = {n.name: n for n in self.converted.graph.nodes}
        last_uses = _last_uses(self.original.graph)
        for node in self.original.graph.nodes:
            diverges = {c.number for c in self.chunks if self._diverges(node, c)}
            for chunk in self.chunks:
                if chunk.number in diverges and _may_write(self.original, node):
                    for source in node.all_input_nodes:
                        chunk.converted[source] = _copied(chunk.value(source))
                chunk.original[node] = _execute(self.original, node, chunk.original, chunk.inputs)
            yield node
            for chunk in self.chunks:
                if chunk.number in diverges:
                    twin = twins[node.name]
                    sources = node.all_input_nodes if node.name not in self.changed else node.all_input_nodes[:1]
                    env = dict(zip(twin.all_input_nodes, map(chunk.value, sources), strict=True))
                    chunk.converted[node] = _execute(self.converted, twin, env, [])
                for old in last_uses.get(node, ()):
                    chunk.original.pop(old, None)
                    chunk.converted.pop(old, None)

    def _diverges(self, node: fx.Node, chunk: Chunk) -> bool:
        return node.name in self.changed or any(source in chunk.converted for source in node.all_input_nodes)


class Watched(fx.Interpreter):
    """Runs a traced module; what the named nodes make goes through `look`, and on as `look` returns it."""

    def __init__(self, module: fx.GraphModule, nodes: set[str], look: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__(module)
        self.nodes, self.look = nodes, look

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        return self.look(n.name, result) if n.name in self.nodes and isinstance(result, Tensor) else result


def chunks_of(module: fx.GraphModule, calibration: Iterable[Any]) -> list[Chunk]:
    """The calibration batches bound to the model's inputs; further elements of a tuple are left out."""
    count = sum(n.op == "placeholder" for n in module.graph.nodes)
    if isinstance(calibration, Tensor | Mapping):
        calibration = [calibration]
    chunks: list[Chunk] = []
    seen = 0
    for number, batch in enumerate(calibration):
        args, kwargs = as_arguments(batch)
        inputs = bind_inputs(module, args[:count], kwargs)
        tensors = [v for v in inputs if isinstance(v, Tensor)]
        if not tensors or tensors[0].dim() == 0 or len(tensors[0]) == 0:
            raise GhostifyError(f"calibration batch {number}: holds no images")
        if not all(t.isfinite().all() for t in tensors if t.is_floating_point()):
            raise GhostifyError(f"calibration batch {number}: holds NaN or infinite values")
        chunks.append(Chunk(number, seen, len(tensors[0]), inputs))
        seen += len(tensors[0])
    if not chunks:
        raise GhostifyError("calibration yields no batches: pass a list or a DataLoader, not a spent iterator")
    return chunks


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """After which node each value is not read any more."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    uses: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        uses.setdefault(max(node.users, key=order.__getitem__, default=node), []).append(node)
    return uses


def _execute(module: fx.GraphModule, node: fx.Node, env: Env, inputs: list[Any]) -> Any:
    target: Any = node.target
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    if node.op == "placeholder":
        return inputs[[n for n in module.graph.nodes if n.op == "placeholder"].index(node)]
    if node.op == "get_attr":
        return operator.attrgetter(target)(module)
    if node.op == "call_module":
        return called(module, node)(*args, **kwargs)
    if node.op == "call_function":
        return target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return args[0]


def _may_write(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether running a node might change one of its inputs."""
    if node.op == "call_module":
        inner = called(module, node)
        return not isinstance(inner, READ_ONLY) or any(getattr(m, "inplace", False) for m in inner.modules())
    return node.op in ("call_function", "call_method")


def _copied(value: Any) -> Any:
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)
