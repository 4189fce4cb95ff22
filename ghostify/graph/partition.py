"""A model that does not trace as a whole -> the largest modules in it that do, each with a graph of its own."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ghostify.graph.call_hooks import on_calls
from ghostify.graph.inputs import CallInputs, call_model, tensor_leaves
from ghostify.graph.methods import TracedModule
from ghostify.graph.modes import eval_mode
from ghostify.graph.paths import join_path
from ghostify.graph.program import single_conv_graph
from ghostify.graph.symbolic_tracer import UntraceableError, trace_graph
from ghostify.numerics import outputs_match

CallSignatures = Mapping[int, inspect.BoundArguments]
TOLERANCE = 1e-3
CONV_WEIGHT_DIM = 4


def trace_submodules(
    root: nn.Module, given: CallSignatures, *, whole: bool = True
) -> tuple[nn.Module, dict[str, fx.GraphModule], str]:
    """The module with graphs wherever its convolutions are, the parts by path, and why the root does not trace, if so.

    `root` is changed. `given` says how modules are called, by their ids. Inner parts come before outer ones. Without
    `whole`, only the root is traced, and what it has no graph of falls into single convolutions.
    """
    entering = _Entering(root, given, whole)
    entering.trace_submodules("")
    return entering.root, entering.parts, entering.reason


class _Entering:
    def __init__(self, root: nn.Module, given: CallSignatures, whole: bool) -> None:
        self.root, self.given, self.whole = root, given, whole
        self.parts: dict[str, fx.GraphModule] = {}
        self.entered: dict[int, nn.Module] = {}
        self.reason = ""

    def trace_submodules(self, path: str) -> None:
        module = self.root.get_submodule(path)
        if id(module) in self.entered:
            self._put(path, self.entered[id(module)])
            return
        self.entered[id(module)] = module
        if isinstance(module, nn.Conv2d):
            self.parts[path] = single_conv_graph(module)
            return
        if path and not contains_convs(module):
            return
        try:
            graph = self._graph(module, path)
        except UntraceableError as error:
            self.reason = str(error) if not path else self.reason
            for name, _ in list(module.named_children()):
                self.trace_submodules(join_path(path, name))
            return
        made = TracedModule(module, graph, class_name=type(module).__name__).train(module.training)
        self.entered[id(module)] = made
        self._put(path, made)
        for target in dict.fromkeys(str(n.target) for n in made.graph.nodes if n.op == "call_module"):
            if not isinstance(made.get_submodule(target), nn.Conv2d):
                self.trace_submodules(join_path(path, target))
        self.parts[path] = made

    def _graph(self, module: nn.Module, path: str) -> fx.Graph:
        if path and not self.whole:
            raise UntraceableError("only its convolutions are entered")
        call = self.given.get(id(module))
        if call is None:
            return trace_graph(module, set())
        return trace_graph(module, tensor_arguments(call) if path else set(call.arguments))

    def _put(self, path: str, module: nn.Module) -> None:
        if path:
            self.root.set_submodule(path, module)
        else:
            self.root = module


def tensor_arguments(call: inspect.BoundArguments) -> set[str]:
    """The arguments of a call that stay inputs of a graph.

    Raises `UntraceableError` where a flag, or one that is left out, is not at its default.
    """
    found = set()
    for name, value in call.arguments.items():
        parameter = call.signature.parameters[name]
        if value is None or isinstance(value, bool | str):
            if value is not parameter.default:
                raise UntraceableError(f"it is called with {name}={value!r}")
        else:
            found.add(name)
    return found


def contains_convs(module: nn.Module) -> bool:
    """Whether there is a `Conv2d` in it, or filters that may be those of a functional one."""
    convolves = any(isinstance(m, nn.Conv2d) for m in module.modules())
    return convolves or any(p.dim() == CONV_WEIGHT_DIM for p in module.parameters())


def record_first_calls(root: nn.Module, inputs: CallInputs) -> dict[int, inspect.BoundArguments]:
    """The first call of every module of `root` that holds convolutions, in one forward in evaluation mode.

    As far as that comes: whoever records the forward says what is wrong with it.
    """
    found: dict[int, inspect.BoundArguments] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) not in found:
            found[id(module)] = inspect.signature(module.forward).bind(*args, **kwargs)

    holders = [m for m in root.modules() if not isinstance(m, nn.Conv2d) and (m is root or contains_convs(m))]
    with on_calls(holders, before=note), eval_mode(root), contextlib.suppress(Exception):
        call_model(root, inputs)
    return found


def models_match(a: nn.Module, a_inputs: CallInputs, b: nn.Module, b_inputs: CallInputs) -> bool:
    """Whether two models answer alike in evaluation mode."""
    answers = []
    for module, inputs in ((a, a_inputs), (b, b_inputs)):
        with eval_mode(module):
            answers.append(tensor_leaves(call_model(module, inputs)))
    return outputs_match(answers[0], answers[1], TOLERANCE)
