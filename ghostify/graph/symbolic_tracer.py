"""Symbolic tracing of a forward to a graph: untraceable submodules become leaves, `training` is read at run time."""

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
MODULE_INTERNALS = frozenset(nn.Module().__dict__)
PLAIN_DICTS = (dict, OrderedDict, immutable_dict)


class TrainingFlag(nn.Module):
    """A module that returns its `training`, in a graph in place of `self.training` of the module that read it."""

    def forward(self) -> bool:
        return self.training


def check_default_argument(value: Any, default: Any, name: str) -> None:
    """Raise `GhostifyError` where an optional argument is not at its default, at which it was traced."""
    if value is not default and not (type(value) is type(default) and value == default):
        raise GhostifyError(
            f"forward: argument {name!r} was fixed at its default {default!r} when the model was traced. "
            f"Pass it in example_inputs to keep it an input."
        )


def check_no_extra_arguments(value: Any, name: str) -> None:
    """Raise `GhostifyError` where `*args` or `**kwargs`, traced as empty, are not empty."""
    if value:
        raise GhostifyError(
            f"forward: {name} was empty when the model was traced. Pass values in example_inputs to keep it an input."
        )


def check_training_mode(mode: bool, traced: bool, name: str) -> None:
    """Raise `GhostifyError` where a module whose forward branches on `training` is not in the mode it was traced in."""
    if mode is not traced:
        traced_mode, other_mode = ("train", "eval") if traced else ("eval", "train")
        raise GhostifyError(
            f"{name or 'the model'}: its forward branches on its mode and was traced in {traced_mode} mode. "
            f"Call .{other_mode}() on the original before the conversion to trace the other branch."
        )


GUARDS = (check_default_argument, check_no_extra_arguments, check_training_mode)


def is_guard(node: fx.Node) -> bool:
    """Whether the node only checks an assumption made when the model was traced."""
    return node.op == "call_function" and node.target in GUARDS


class UntraceableError(Exception):
    """A forward cannot be traced; the message is the reason."""


def trace_graph(root: nn.Module, input_names: Set[str]) -> fx.Graph:
    """The graph of a forward, in which every submodule that does not trace is a leaf.

    Tracing restarts with each new leaf. `input_names` are optional arguments that stay inputs; others are fixed at
    their defaults. A module that branches on its own mode and contains convolutions, or is `root`, is traced in its
    present mode. Raises `UntraceableError`.
    """
    if is_notrace(root):
        raise UntraceableError("timm marks it as not traceable")
    leaves: set[str] = set()
    fixed_mode_paths: set[str] = set()
    while True:
        tracer = _Tracer(leaves, fixed_mode_paths, input_names)
        try:
            with _restore_attributes(root), _trace_training_flag(root, tracer), record_methods(root) as mark_methods:
                graph = tracer.trace(root)
                mark_methods(graph)
                return graph
        except Exception as error:
            failed = tracer.call_stack[-1] if tracer.call_stack else ""
            for module in root.modules():
                module._modules.pop("ghostify_mode", None)
            has_convs = any(isinstance(m, nn.Conv2d) for m in root.get_submodule(failed).modules())
            if tracer.last_mode_path == failed and failed not in fixed_mode_paths and (has_convs or not failed):
                fixed_mode_paths.add(failed)
            elif not failed:
                raise UntraceableError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
            else:
                leaves.add(failed)


class _EmptyKeywords(dict[str, Any]):
    """An empty `**kwargs` that torch.fx treats as one value."""


class _EmptyArguments(tuple[()]):
    """An empty `*args` that torch.fx treats as one value."""

    __slots__ = ()


def is_notrace(module: nn.Module) -> bool:
    """Whether timm marks modules of this class as not traceable."""
    return isinstance(module, tuple(get_notrace_modules()))


class _Tracer(fx.Tracer):
    """An fx tracer that turns reads of `self.training` into nodes and does not enter `leaves`."""

    def __init__(self, leaves: Set[str], fixed_mode_paths: set[str], input_names: Set[str]) -> None:
        super().__init__(autowrap_functions=tuple(f for f in get_notrace_functions() if callable(f)))
        self.leaves, self.fixed_mode_paths, self.input_names = leaves, fixed_mode_paths, input_names
        self.last_mode_path: str | None = None
        self.call_stack: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.leaves
            or is_notrace(m)
            or isinstance(m, nn.Conv2d | Linear)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.call_stack.append(self.path_of_module(m))
        if self.call_stack.count(self.call_stack[-1]) > MAX_RECURSION:
            raise RecursionError(f"it calls itself more than {MAX_RECURSION} times within one call")
        result = super().call_module(m, forward, args, kwargs)
        self.call_stack.pop()  # not in a `finally`: after an error the top names the module that does not trace
        return result

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) not in PLAIN_DICTS:
            raise TypeError(f"it creates a {type(a).__name__}, which a graph would replace by a plain dict")
        return super().create_arg(a)

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: Any, fn_for_analysis: Any) -> Any:
        proxy = super()._proxy_placeholder(name, concrete_args, sig, fn_for_analysis)
        if name.startswith("*") and name.lstrip("*") not in self.input_names:
            self.create_proxy("call_function", check_no_extra_arguments, (proxy, name), {})
            return _EmptyKeywords() if name.startswith("**") else _EmptyArguments()
        parameter = sig.parameters.get(name)
        if parameter is None or parameter.default is parameter.empty or name in self.input_names:
            return proxy
        if not isinstance(parameter.default, bool | int | float | str | None):
            return proxy
        self.create_proxy("call_function", check_default_argument, (proxy, parameter.default, name), {})
        return parameter.default

    def read_training(self, path: str, module: nn.Module) -> fx.Proxy | bool:
        """A node that reads the module's mode; the mode itself, with a check of it in the graph, where it is fixed."""
        self.last_mode_path = path
        if "ghostify_mode" not in module._modules:
            module.ghostify_mode = TrainingFlag().train(module.__dict__["training"])
        mode = self.create_proxy("call_module", join_path(path, "ghostify_mode"), (), {})
        if path not in self.fixed_mode_paths:
            return mode
        present_mode: bool = module.__dict__["training"]
        self.create_proxy("call_function", check_training_mode, (mode, present_mode, path), {})
        return present_mode


@contextlib.contextmanager
def _restore_attributes(root: nn.Module) -> Iterator[None]:
    """Restore attributes that forwards write to their modules, such as caches, in which tracing leaves proxies."""
    saved = [
        (m, {k: (v, copy.copy(v) if isinstance(v, CACHES) else v) for k, v in _attributes(m)}) for m in root.modules()
    ]
    try:
        yield
    finally:
        for module, attributes in saved:
            for key, value in _attributes(module):
                if key not in attributes and not isinstance(value, Tensor):  # a constant of the graph
                    del module.__dict__[key]
            for key, (value, content) in attributes.items():
                module.__dict__[key] = value
                if isinstance(value, dict | set):
                    value.clear()
                    value.update(content)
                elif isinstance(value, list):
                    value[:] = content


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """A module's attributes except functions and the internals of `nn.Module`."""
    return [
        (k, v) for k, v in vars(module).items() if k not in MODULE_INTERNALS and not isinstance(v, types.FunctionType)
    ]


@contextlib.contextmanager
def _trace_training_flag(root: nn.Module, tracer: _Tracer) -> Iterator[None]:
    """Make reads of `training` of the modules of `root` nodes of the graph, while active."""
    paths: Mapping[int, str] = {id(m): path for path, m in root.named_modules()}

    def get_mode(module: nn.Module) -> Any:
        path = None if isinstance(module, TrainingFlag) else paths.get(id(module))
        return module.__dict__["training"] if path is None else tracer.read_training(path, module)

    def set_mode(module: nn.Module, mode: bool) -> None:
        module.__dict__["training"] = mode

    nn.Module.training = property(get_mode, set_mode)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training
