"""Original and converted graph side by side: every node runs once per calibration batch, only live values are kept."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_map

from ghostify.fitting.activation_store import ActivationStore, restore, trim_heap
from ghostify.fitting.calibration import CalibrationBatch
from ghostify.graph.executor import last_uses, run_node
from ghostify.graph.inputs import placeholders, tensor_leaves, values_of
from ghostify.graph.op_queries import may_mutate_input

MEMORY_LIMIT_BYTES = 1 << 30
TRIM_AFTER_BATCHES = 16


class NodeValues(dict[fx.Node, Any]):
    """One model's live values by node; what lies in a file comes back when it is asked for."""

    def __getitem__(self, node: fx.Node) -> Any:
        value = self[node] = restore(super().__getitem__(node))
        return value


@dataclass(eq=False)
class BatchState:
    """One calibration batch on its way, and the values that later nodes still read.

    `converted` holds only the values that differ from the original's.
    """

    batch: CalibrationBatch
    original: NodeValues = field(default_factory=NodeValues)
    converted: NodeValues = field(default_factory=NodeValues)

    def value(self, node: fx.Node) -> Any:
        """The node's value in the converted model."""
        return self.converted[node] if node in self.converted else self.original[node]

    def offload(self, shelf: ActivationStore) -> None:
        """Put the values aside; those that share their memory stay where they are."""
        owners = Counter(p for side in (self.original, self.converted) for v in side.values() for p in _memory(v))
        for side in (self.original, self.converted):
            for node, value in list(side.items()):
                side[node] = shelf.put(value, movable=all(owners[p] == 1 for p in _memory(value)))


class LockstepRun:
    """Steps through the graph of `module` with a copy of it that the caller converts on the way.

    The walk stops at the nodes named `stops`; `changed` names all nodes whose module the caller is going to replace or
    change, or that differs already in `converted`, of which the copy then is. From one stop to the next, one batch
    after another goes the whole way; what it needs later is put aside, beyond `limit` bytes (default 1 GiB) in
    temporary files. With many batches, free memory goes back after each.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        batches: Iterable[CalibrationBatch],
        stops: set[str],
        changed: set[str],
        *,
        converted: fx.GraphModule | None = None,
        limit: int = MEMORY_LIMIT_BYTES,
    ) -> None:
        self.original = copy.deepcopy(module).eval()
        self.converted = copy.deepcopy(module if converted is None else converted).eval()
        self.chunks, self.changed = [BatchState(batch) for batch in batches], changed | stops
        self.nodes = list(self.original.graph.nodes)
        self.stops = [k for k, node in enumerate(self.nodes) if node.name in stops]
        self._converted_nodes = {n.name: n for n in self.converted.graph.nodes}
        self._named = {n.name: n for n in self.nodes}
        self._inputs = placeholders(self.original)
        self._last_uses = last_uses(self.original.graph)
        self._shelf = ActivationStore(limit)

    def node(self, name: str | None) -> fx.Node | None:
        """The original's node of that name."""
        return None if name is None else self._named.get(name)

    def steps(self) -> Iterator[tuple[fx.Node, Iterator[BatchState]]]:
        """At each stop its node, and the batches one by one: the original has run the node, the converted not yet."""
        begin = 0
        for end in self.stops:
            arriving = self._run_segment(begin, end)
            yield self.nodes[end], arriving
            for _ in arriving:
                pass
            begin = end

    def _run_segment(self, begin: int, end: int) -> Iterator[BatchState]:
        for chunk in self.chunks:
            for k in range(begin, end + 1):
                if k > begin or k == 0:
                    self._run_original(self.nodes[k], chunk)
                if k < end:
                    self._run_converted(self.nodes[k], chunk)
            yield chunk
            chunk.offload(self._shelf)
            if len(self.chunks) > TRIM_AFTER_BATCHES:
                trim_heap()

    def _run_original(self, node: fx.Node, chunk: BatchState) -> None:
        if self._diverges(node, chunk) and may_mutate_input(self.original, node):
            for source in node.all_input_nodes:
                if _memory(chunk.value(source)) & _memory(chunk.original[source]):
                    chunk.converted[source] = _copied(chunk.value(source))
        if node.op == "placeholder":
            chunk.original[node] = values_of(chunk.batch.inputs)[self._inputs.index(node)]
        else:
            chunk.original[node] = run_node(self.original, node, chunk.original)

    def _run_converted(self, node: fx.Node, chunk: BatchState) -> None:
        if self._diverges(node, chunk):
            if node.op == "placeholder":
                chunk.converted[node] = values_of(chunk.batch.converted_inputs)[self._inputs.index(node)]
            else:
                twin = self._converted_nodes[node.name]
                values = NodeValues({source: chunk.value(self._named[source.name]) for source in twin.all_input_nodes})
                chunk.converted[node] = run_node(self.converted, twin, values)
        for old in self._last_uses.get(node, ()):
            chunk.original.pop(old, None)
            chunk.converted.pop(old, None)

    def _diverges(self, node: fx.Node, chunk: BatchState) -> bool:
        if node.op == "placeholder":
            return chunk.batch.converted_stored is not None
        return node.name in self.changed or any(source in chunk.converted for source in node.all_input_nodes)


def _copied(value: Any) -> Any:
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


def _memory(value: Any) -> set[int]:
    """Addresses of the memory that a value's tensors lie in."""
    return {t.untyped_storage().data_ptr() for t in tensor_leaves(value)}
