"""The graph of a forward that is the same in both modes and in every call: what does not trace so becomes a leaf."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ghostify.graph.methods import record_methods
from ghostify.graph.module_state import ModuleState
from ghostify.graph.symbolic_tracer import MODE_PATH, SymbolicTracer, TrainingFlag, UntraceableError, is_notrace
from ghostify.text import first_line

PLAIN_STATE = (bool, int, float, str)


def trace_graph(root: nn.Module, input_names: Set[str]) -> fx.Graph:
    """The graph of a forward, in which every submodule that does not trace is a leaf.

    Tracing restarts with each new leaf. `input_names` are optional arguments that stay inputs; others are fixed at
    their defaults. Where a module that contains convolutions branches on its own mode, its forward is traced in both
    modes, and does not trace unless the graphs are equal. Neither does a forward that changes buffers, or attributes
    which it reads itself, or runs parts in another gradient mode or autocast state. Raises `UntraceableError`.
    """
    if is_notrace(root):
        raise UntraceableError("timm marks it as not traceable")
    if isinstance(root, torch.jit.ScriptModule):
        raise UntraceableError("it is compiled by torch.jit")
    if type(root).__call__ is not nn.Module.__call__ and not isinstance(root, fx.GraphModule):
        raise UntraceableError("its class overrides __call__")
    search = _Search(root, input_names)
    while (graph := search.attempt()) is None:
        pass
    return graph


class _ForwardError(Exception):
    """The forward of the module at `path` does not trace; the message is the reason."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path


@dataclass(frozen=True, eq=False)
class _TracedForward:
    """A graph, its constants by name, and the paths of the modules on whose mode a forward branched."""

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    branches: Set[str]


class _Search:
    """The search for a graph of the root's forward, with the leaves so far."""

    def __init__(self, root: nn.Module, input_names: Set[str]) -> None:
        self.root, self.input_names = root, input_names
        self.state = ModuleState(root)
        self.leaves: set[str] = set()

    def attempt(self) -> fx.Graph | None:
        """The graph; None after a failure, for which a leaf is added.

        Raises `UntraceableError` where the root's own forward fails.
        """
        try:
            traced = self._trace({})
            self._check_modes(traced)
        except _ForwardError as error:
            if not error.path or error.path in self.leaves:
                raise UntraceableError(str(error)) from error
            self.leaves.add(error.path)
            return None
        self._add_attributes(traced)
        return traced.graph

    def _check_modes(self, traced: _TracedForward) -> None:
        """Raise `_ForwardError` where the graph differs in other modes of the modules on whose mode it branches."""
        flipped = {path: not self.root.get_submodule(path).training for path in sorted(traced.branches)}
        if flipped and not self._is_same(traced, flipped):
            for path in flipped:
                if len(flipped) == 1 or not self._is_same(traced, {path: flipped[path]}):
                    raise _ForwardError(path, "it depends on its mode")
            raise _ForwardError("", "it depends on the modes of several modules")

    def _is_same(self, traced: _TracedForward, modes: Mapping[str, bool]) -> bool:
        """Whether the graph is the same in other modes; other modules may be called in them."""
        return _are_equal(traced, self._trace(modes))

    def _add_attributes(self, traced: _TracedForward) -> None:
        """Give the root what the graph reads: constants, and modules that return modes."""
        for name, value in traced.constants.items():
            setattr(self.root, name, value)
        for node in list(traced.graph.nodes):
            if _is_mode(node) and not node.users:
                traced.graph.erase_node(node)
            elif _is_mode(node):
                owner = self.root.get_submodule(str(node.target).rpartition(".")[0])
                owner._modules.setdefault(MODE_PATH, TrainingFlag().train(owner.training))

    def _trace(self, modes: Mapping[str, bool]) -> _TracedForward:
        try:
            traced = self._trace_once(modes)
            self._check_state(modes, traced)
            return traced
        finally:
            self.state.restore()

    def _trace_once(self, modes: Mapping[str, bool]) -> _TracedForward:
        tracer = SymbolicTracer(self.leaves, modes, self.input_names)
        try:
            with record_methods(self.root) as mark_methods:
                graph = tracer.trace_forward(self.root)
                mark_methods(graph)
                return _TracedForward(graph, tracer.constants, tracer.branches)
        except Exception as error:
            raise _ForwardError(tracer.failed_path, f"{type(error).__name__}: {first_line(error)}") from error

    def _check_state(self, modes: Mapping[str, bool], traced: _TracedForward) -> None:
        """Raise `_ForwardError` where the forward changed buffers or numbers, or depends on attributes that it set."""
        if (buffer := self.state.changed_buffer()) is not None:
            raise _ForwardError(buffer[0], f"it changes its buffer {buffer[1]!r}")
        changed = [c for c in self.state.changed_attributes() if c[2] not in traced.constants]
        for path, _, name, value in changed:
            if isinstance(value, PLAIN_STATE):
                raise _ForwardError(path, f"it changes its attribute {name!r}")
        if changed:
            self.state.restore()
            for _, module, name, value in changed:
                vars(module)[name] = value
            if not _are_equal(traced, self._trace_once(modes)):
                raise _ForwardError(changed[0][0], f"it depends on its attribute {changed[0][2]!r} of the last call")


def _are_equal(a: _TracedForward, b: _TracedForward) -> bool:
    """Whether two graphs of the same forward compute the same; nodes that only read what is not used do not count."""
    nodes, other_nodes = _used_nodes(a.graph), _used_nodes(b.graph)
    if a.constants.keys() != b.constants.keys() or len(nodes) != len(other_nodes):
        return False
    copies: dict[fx.Node, fx.Node] = {}
    for x, y in zip(nodes, other_nodes, strict=True):
        arguments = map_arg((x.args, x.kwargs), copies.get)
        if (x.op, x.target) != (y.op, y.target) or arguments != (y.args, y.kwargs):
            return False
        copies[x] = y
    return all(torch.equal(value, b.constants[name]) for name, value in a.constants.items())


def _used_nodes(graph: fx.Graph) -> list[fx.Node]:
    used: list[fx.Node] = []
    unused: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if (node.op == "get_attr" or node.target is getattr or _is_mode(node)) and unused.issuperset(node.users):
            unused.add(node)
        else:
            used.append(node)
    return used[::-1]


def _is_mode(node: fx.Node) -> bool:
    """Whether the node reads the mode of a module."""
    return node.op == "call_module" and str(node.target).rpartition(".")[2] == MODE_PATH
