"""One module's forward -> a graph, with leaves for what does not trace; `training` stays live in it."""

from __future__ import annotations

import contextlib
import copy
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Set
from typing import Any

from timm.layers import Linear, get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict

from ghostify.errors import GhostifyError
from ghostify.graph.methods import record_methods
from ghostify.graph.paths import join_path

MAX_RECURSION = 64
CACHES = (dict, list, set)
OWN = frozenset(nn.Module().__dict__)
PLAIN_DICTS = (dict, OrderedDict, immutable_dict)


class TrainingFlag(nn.Module):
    """Stands in a graph for `self.training` of the module that read it, so that `train()` and `eval()` still count."""

    def forward(self) -> bool:
        return self.training


def check_default_argument(value: Any, default: Any, name: str) -> None:
    """Stand guard in a graph over an optional argument that was left at its default when the model was traced."""
    if value is not default and not (type(value) is type(default) and value == default):
        raise GhostifyError(
            f"argument {name!r} was fixed at its default {default!r} when the model was traced: "
            f"name it in example_inputs to keep it an input"
        )


def check_no_extra_arguments(value: Any, name: str) -> None:
    """Stand guard in a graph over `*args` or `**kwargs` that took nothing when the model was traced."""
    if value:
        raise GhostifyError(f"{name} took nothing when the model was traced: name what it takes in example_inputs")


def check_training_mode(mode: bool, traced: bool, name: str) -> None:
    """Stand guard in a graph over a module whose forward branches on `training`: tracing followed one way only."""
    if mode is not traced:
        was, now = ("train", "eval") if traced else ("eval", "train")
        raise GhostifyError(
            f"{name or 'the model'} branches on its mode and was traced in {was} mode: "
            f"call .{now}() on the original before converting it, to have it the other way"
        )


GUARDS = (check_default_argument, check_no_extra_arguments, check_training_mode)


def is_guard(node: fx.Node) -> bool:
    """Whether the node only checks what was assumed when the model was traced."""
    return node.op == "call_function" and node.target in GUARDS


class UntraceableError(Exception):
    """A forward of which there is no graph; says why."""


def trace_graph(root: nn.Module, given: Set[str]) -> fx.Graph:
    """Trace a forward; whatever inside turns out not to trace becomes a leaf, and tracing starts again.

    `given` names the optional arguments that stay inputs; the others are fixed at their defaults. What branches on its
    own mode and holds convolutions, or is `root`, is traced in its present mode. Raises `UntraceableError`.
    """
    if is_notrace(root):
        raise UntraceableError("timm marks it as not to be traced")
    leaves: set[str] = set()
    fixed_mode_paths: set[str] = set()
    while True:
        tracer = _Tracer(leaves, fixed_mode_paths, given)
        try:
            with _restore_attributes(root), _trace_training_flag(root, tracer), record_methods(root) as mark_methods:
                graph = tracer.trace(root)
                mark_methods(graph)
                return graph
        except Exception as error:
            inside = tracer.inside[-1] if tracer.inside else ""
            for module in root.modules():
                module._modules.pop("ghostify_mode", None)
            convolves = any(isinstance(m, nn.Conv2d) for m in root.get_submodule(inside).modules())
            if tracer.last_mode == inside and inside not in fixed_mode_paths and (convolves or not inside):
                fixed_mode_paths.add(inside)
            elif not inside:
                raise UntraceableError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
            else:
                leaves.add(inside)


class _NoKeywords(dict[str, Any]):
    """An empty `**kwargs` that torch.fx takes for one value."""


class _NoArguments(tuple[()]):
    """An empty `*args` that torch.fx takes for one value."""

    __slots__ = ()


def is_notrace(module: nn.Module) -> bool:
    """Whether timm marks modules of this class as not to be traced."""
    return isinstance(module, tuple(get_notrace_modules()))


class _Tracer(fx.Tracer):
    """Symbolic tracing that keeps `self.training` live and takes as leaves what is known, or found, not to trace."""

    def __init__(self, leaves: Set[str], fixed_mode_paths: set[str], given: Set[str]) -> None:
        super().__init__(autowrap_functions=tuple(f for f in get_notrace_functions() if callable(f)))
        self.leaves, self.fixed_mode_paths, self.given = leaves, fixed_mode_paths, given
        self.last_mode: str | None = None
        self.inside: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.leaves
            or is_notrace(m)
            or isinstance(m, nn.Conv2d | Linear)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.inside.append(self.path_of_module(m))
        if self.inside.count(self.inside[-1]) > MAX_RECURSION:
            raise RecursionError(f"it calls itself more than {MAX_RECURSION} times within one call")
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # not in a `finally`: after an error the top names the module that does not trace
        return result

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) not in PLAIN_DICTS:
            raise TypeError(f"it makes a {type(a).__name__}, which a graph would turn into a plain dict")
        return super().create_arg(a)

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: Any, fn_for_analysis: Any) -> Any:
        proxy = super()._proxy_placeholder(name, concrete_args, sig, fn_for_analysis)
        if name.startswith("*") and name.lstrip("*") not in self.given:
            self.create_proxy("call_function", check_no_extra_arguments, (proxy, name), {})
            return _NoKeywords() if name.startswith("**") else _NoArguments()
        parameter = sig.parameters.get(name)
        if parameter is None or parameter.default is parameter.empty or name in self.given:
            return proxy
        if not isinstance(parameter.default, bool | int | float | str | None):
            return proxy
        self.create_proxy("call_function", check_default_argument, (proxy, parameter.default, name), {})
        return parameter.default

    def mode_of(self, path: str, module: nn.Module) -> fx.Proxy | bool:
        self.last_mode = path
        if "ghostify_mode" not in module._modules:
            module.ghostify_mode = TrainingFlag().train(module.__dict__["training"])
        mode = self.create_proxy("call_module", join_path(path, "ghostify_mode"), (), {})
        if path not in self.fixed_mode_paths:
            return mode
        now = module.__dict__["training"]
        self.create_proxy("call_function", check_training_mode, (mode, now, path), {})
        return now


@contextlib.contextmanager
def _restore_attributes(root: nn.Module) -> Iterator[None]:
    """What forwards keep on their modules, such as caches, is afterwards what it was: tracing would leave proxies."""
    before = [(m, {k: (v, copy.copy(v) if isinstance(v, CACHES) else v) for k, v in _kept(m)}) for m in root.modules()]
    try:
        yield
    finally:
        for module, kept in before:
            for key, value in _kept(module):
                if key not in kept and not isinstance(value, Tensor):  # torch.fx keeps a graph's constants so
                    del module.__dict__[key]
            for key, (value, content) in kept.items():
                module.__dict__[key] = value
                if isinstance(value, dict | set):
                    value.clear()
                    value.update(content)
                elif isinstance(value, list):
                    value[:] = content


def _kept(module: nn.Module) -> list[tuple[str, Any]]:
    """A module's own plain attributes."""
    return [(k, v) for k, v in vars(module).items() if k not in OWN and not isinstance(v, types.FunctionType)]


@contextlib.contextmanager
def _trace_training_flag(root: nn.Module, tracer: _Tracer) -> Iterator[None]:
    """While tracing, reading `training` of a module of `root` yields a node of its graph."""
    paths: Mapping[int, str] = {id(m): path for path, m in root.named_modules()}

    def get(module: nn.Module) -> Any:
        path = None if isinstance(module, TrainingFlag) else paths.get(id(module))
        return module.__dict__["training"] if path is None else tracer.mode_of(path, module)

    def put(module: nn.Module, mode: bool) -> None:
        module.__dict__["training"] = mode

    nn.Module.training = property(get, put)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training
