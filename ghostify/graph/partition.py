"""Subgraphs of a model that does not trace as a whole: the largest submodules that do, each with a graph."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from ghostify.graph.call_hooks import on_calls
from ghostify.graph.forward_graph import trace_graph
from ghostify.graph.inputs import CallInputs, call_model, tensor_leaves
from ghostify.graph.methods import TracedModule
from ghostify.graph.modes import eval_mode
from ghostify.graph.paths import join_path
from ghostify.graph.program import single_conv_graph
from ghostify.graph.symbolic_tracer import UntraceableError, is_guard
from ghostify.modules.hooks import copy_hooks
from ghostify.numerics import outputs_match

CallSignatures = Mapping[int, inspect.BoundArguments]
TOLERANCE = 1e-3
CONV_WEIGHT_DIM = 4


def trace_submodules(
    root: nn.Module, signatures: CallSignatures, *, whole: bool = True
) -> tuple[nn.Module, dict[str, fx.GraphModule], str]:
    """The module with a graph around each of its convolutions, the subgraphs by path, and why the root has no graph.

    `root` is changed in place. `signatures` has the first call of each module by the module's id. Inner subgraphs come
    before outer ones. The reason is empty where the root traces. Without `whole`, only the root and single
    convolutions are traced.
    """
    partitioner = _Partitioner(root, signatures, whole)
    partitioner.trace("")
    return partitioner.root, partitioner.subgraphs, partitioner.reason


class _Partitioner:
    def __init__(self, root: nn.Module, signatures: CallSignatures, whole: bool) -> None:
        self.root, self.signatures, self.whole = root, signatures, whole
        self.calls_by_graphs: dict[int, inspect.BoundArguments] = {}
        self.subgraphs: dict[str, fx.GraphModule] = {}
        self.visited: dict[int, nn.Module] = {}
        self.reason = ""

    def trace(self, path: str) -> None:
        """Trace the module at `path`, or the modules inside it; one that has another path too is traced once."""
        module = self.root.get_submodule(path)
        if id(module) in self.visited:
            self._replace(path, self.visited[id(module)])
            return
        self.visited[id(module)] = module
        if isinstance(module, nn.Conv2d):
            self.subgraphs[path] = single_conv_graph(module)
            return
        if path and not contains_convs(module):
            return
        try:
            graph = self._graph(module, path)
        except UntraceableError as error:
            self.reason = str(error) if not path else self.reason
            for name, _ in list(module.named_children()):
                self.trace(join_path(path, name))
            return
        traced = TracedModule(module, graph, class_name=type(module).__name__).train(module.training)
        copy_hooks(module, traced)
        self.visited[id(module)] = traced
        self._replace(path, traced)
        calls = {str(n.target): n for n in reversed(traced.graph.nodes) if n.op == "call_module"}
        for target, node in reversed(calls.items()):
            inner = traced.get_submodule(target)
            if not isinstance(inner, nn.Conv2d):
                with contextlib.suppress(TypeError, ValueError):
                    self.calls_by_graphs[id(inner)] = inspect.signature(inner.forward).bind(*node.args, **node.kwargs)
                self.trace(join_path(path, target))
        self.subgraphs[path] = traced

    def _graph(self, module: nn.Module, path: str) -> fx.Graph:
        if path and not self.whole:
            raise UntraceableError("only single convolutions are traced")
        call = self.signatures.get(id(module), self.calls_by_graphs.get(id(module)))
        if call is not None:
            return trace_graph(module, tensor_arguments(call) if path else set(call.arguments))
        graph = trace_graph(module, set())
        if path and any(is_guard(node) for node in graph.nodes):
            raise UntraceableError("it is not known which optional arguments it is called with")
        return graph

    def _replace(self, path: str, module: nn.Module) -> None:
        if path:
            self.root.set_submodule(path, module)
        else:
            self.root = module


def tensor_arguments(call: inspect.BoundArguments) -> set[str]:
    """Names of the arguments of a call that stay inputs of the graph.

    Raises `UntraceableError` where an argument that is a flag, a string or None is not at its default.
    """
    names = set()
    for name, value in call.arguments.items():
        parameter = call.signature.parameters[name]
        if value is None or isinstance(value, bool | str):
            if value is not parameter.default:
                raise UntraceableError(f"it is called with {name}={value!r}")
        else:
            names.add(name)
    return names


def contains_convs(module: nn.Module) -> bool:
    """Whether a module contains a `Conv2d`, or a parameter of four dimensions, which a functional conv may use."""
    has_conv2d = any(isinstance(m, nn.Conv2d) for m in module.modules())
    return has_conv2d or any(p.dim() == CONV_WEIGHT_DIM for p in module.parameters())


def record_first_calls(root: nn.Module, inputs: CallInputs) -> dict[int, inspect.BoundArguments]:
    """The first call of every module of `root` that contains convolutions, by id, in one forward in evaluation mode.

    A forward that fails ends the recording without an error; `record_forward` reports the failure.
    """
    first_calls: dict[int, inspect.BoundArguments] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) not in first_calls:
            first_calls[id(module)] = inspect.signature(module.forward).bind(*args, **kwargs)

    without_graph = (nn.Conv2d, torch.jit.ScriptModule)
    holders = [m for m in root.modules() if not isinstance(m, without_graph) and (m is root or contains_convs(m))]
    with on_calls(holders, before=record), eval_mode(root), contextlib.suppress(Exception):
        call_model(root, inputs)
    return first_calls


def models_match(a: nn.Module, a_inputs: CallInputs, b: nn.Module, b_inputs: CallInputs) -> bool:
    """Whether the outputs of two models in evaluation mode agree within the tolerance."""
    outputs = []
    for module, inputs in ((a, a_inputs), (b, b_inputs)):
        with eval_mode(module):
            outputs.append(tensor_leaves(call_model(module, inputs)))
    return outputs_match(outputs[0], outputs[1], TOLERANCE)
