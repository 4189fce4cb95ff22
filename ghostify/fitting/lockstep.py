"""Lockstep run of the original and the converted graph: each node runs once per batch, only live values are kept."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from ghostify.fitting.activation_store import ActivationStore, restore, trim_heap
from ghostify.fitting.calibration import CalibrationBatch
from ghostify.graph.batches import batch_error
from ghostify.graph.executor import last_uses, run_node
from ghostify.graph.inputs import placeholders, tensor_leaves, values_of
from ghostify.graph.op_queries import may_mutate_input

MEMORY_LIMIT_BYTES = 1 << 30
TRIM_AFTER_BATCHES = 16


class NodeValues(dict[fx.Node, Any]):
    """The live values of one model by node; a value in a file is loaded when it is read."""

    def __getitem__(self, node: fx.Node) -> Any:
        value = self[node] = restore(super().__getitem__(node))
        return value


@dataclass(eq=False)
class BatchState:
    """The progress of one calibration batch: the values that later nodes read.

    `converted` holds only values that differ from the original's.
    """

    batch: CalibrationBatch
    original: NodeValues = field(default_factory=NodeValues)
    converted: NodeValues = field(default_factory=NodeValues)

    def value(self, node: fx.Node) -> Any:
        """The node's value in the converted model."""
        return self.converted[node] if node in self.converted else self.original[node]

    def offload(self, store: ActivationStore) -> None:
        """Move the values to the store; those that share memory with others are not moved."""
        owners = Counter(
            address
            for values in (self.original, self.converted)
            for value in values.values()
            for address in _storage_addresses(value)
        )
        for values in (self.original, self.converted):
            for node, value in list(values.items()):
                values[node] = store.put(value, movable=all(owners[a] == 1 for a in _storage_addresses(value)))


class LockstepRun:
    """A run of the graph of `module` and, in lockstep, of a copy of it that the caller converts at the stops.

    The run stops at the nodes named `stops`. `changed` names all nodes whose modules the caller replaces or changes, or
    that already differ in `converted`, which is copied in place of `module` if given. From one stop to the next, the
    batches run one after another; values that are read later are stored, beyond `limit` bytes (default 1 GiB) in
    temporary files. With many batches, free memory is returned to the system after each.
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
        self.states, self.changed = [BatchState(batch) for batch in batches], changed | stops
        self.nodes = list(self.original.graph.nodes)
        self.stops = [k for k, node in enumerate(self.nodes) if node.name in stops]
        self._converted_nodes = {n.name: n for n in self.converted.graph.nodes}
        self._original_nodes = {n.name: n for n in self.nodes}
        self._inputs = placeholders(self.original)
        self._last_uses = last_uses(self.original.graph)
        self._store = ActivationStore(limit)

    def node(self, name: str | None) -> fx.Node | None:
        """The node of that name in the original graph."""
        return None if name is None else self._original_nodes.get(name)

    def steps(self) -> Iterator[tuple[fx.Node, Iterator[BatchState]]]:
        """The node of each stop, and the batches one by one: the node has run in the original only."""
        begin = 0
        for end in self.stops:
            states = self._run_segment(begin, end)
            yield self.nodes[end], states
            for _ in states:
                pass
            begin = end

    def _run_segment(self, begin: int, end: int) -> Iterator[BatchState]:
        for state in self.states:
            for k in range(begin, end + 1):
                if k > begin or k == 0:
                    self._run_original(self.nodes[k], state)
                if k < end:
                    self._run_converted(self.nodes[k], state)
            yield state
            state.offload(self._store)
            if len(self.states) > TRIM_AFTER_BATCHES:
                trim_heap()

    def _run_original(self, node: fx.Node, state: BatchState) -> None:
        if self._diverges(node, state) and may_mutate_input(self.original, node):
            for source in node.all_input_nodes:
                if _storage_addresses(state.value(source)) & _storage_addresses(state.original[source]):
                    state.converted[source] = _clone_tensors(state.value(source))
        if node.op == "placeholder":
            state.original[node] = values_of(state.batch.inputs)[self._inputs.index(node)]
        else:
            state.original[node] = self._run_on_batch(node, state)

    def _run_on_batch(self, node: fx.Node, state: BatchState) -> Any:
        """The node's value in the original; raises `GhostifyError` where it does not run on the batch."""
        try:
            return run_node(self.original, node, state.original)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise batch_error(state.batch.number, error) from error

    def _run_converted(self, node: fx.Node, state: BatchState) -> None:
        if self._diverges(node, state):
            if node.op == "placeholder":
                state.converted[node] = values_of(state.batch.converted_inputs)[self._inputs.index(node)]
            else:
                converted_node = self._converted_nodes[node.name]
                values = NodeValues(
                    {n: state.value(self._original_nodes[n.name]) for n in converted_node.all_input_nodes}
                )
                state.converted[node] = run_node(self.converted, converted_node, values)
        for source in self._last_uses.get(node, ()):
            state.original.pop(source, None)
            state.converted.pop(source, None)

    def _diverges(self, node: fx.Node, state: BatchState) -> bool:
        if node.op == "placeholder":
            return state.batch.converted_stored is not None
        return node.name in self.changed or any(source in state.converted for source in node.all_input_nodes)


def _clone_tensors(value: Any) -> Any:
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


def _storage_addresses(value: Any) -> set[int]:
    """Addresses of the storages of a value's tensors."""
    return {t.untyped_storage().data_ptr() for t in tensor_leaves(value)}
