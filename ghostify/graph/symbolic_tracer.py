"""The `torch.fx` tracer of one forward, which keeps `training` as a node and patches no class."""

from __future__ import annotations

import inspect
import math
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from typing import Any

from timm.layers import Linear, get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import _autowrap_check, _patch_wrapped_functions, _Patcher
from torch.fx.immutable_collections import immutable_dict

from ghostify.errors import GhostifyError
from ghostify.graph.execution_regions import recorded_regions
from ghostify.graph.intercepted_modules import ScriptedStandIn, intercepted
from ghostify.graph.paths import join_path
from ghostify.modules.hooks import has_hooks

MAX_RECURSION = 64
PLAIN_DICTS = (dict, OrderedDict, immutable_dict)
MODE_PATH = "ghostify_mode"
WRAPPING = threading.RLock()


class TrainingFlag(nn.Module):
    """A module that returns its `training`, in a graph in place of `self.training` of the module that read it."""

    def forward(self) -> bool:
        return self.training


def check_default_argument(value: object, default: object, name: str) -> None:
    """Raise `GhostifyError` where an optional argument is not at its default, at which it was traced."""
    if value is not default and not (type(value) is type(default) and value == default):
        raise GhostifyError(
            f"forward: argument {name!r} was fixed at its default {default!r} when the model was traced. "
            f"Pass it in example_inputs to keep it an input."
        )


def check_no_extra_arguments(value: object, name: str) -> None:
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


class _EmptyKeywords(dict[str, Any]):
    """An empty `**kwargs` that torch.fx treats as one value."""


class _EmptyArguments(tuple[()]):
    """An empty `*args` that torch.fx treats as one value."""

    __slots__ = ()


def is_notrace(module: nn.Module) -> bool:
    """Whether timm marks modules of this class as not traceable."""
    return isinstance(module, tuple(get_notrace_modules()))


class SymbolicTracer(fx.Tracer):
    """Traces one forward. Reads of `self.training` become nodes, and `leaves` and modules with hooks are not entered.

    Where a forward branches on the mode of a module with convolutions, it takes the branch of `modes` at the module's
    path, by default of the present mode, and the path is added to `branches`. `input_names` are optional arguments that
    stay inputs.
    """

    def __init__(self, leaves: Set[str], modes: Mapping[str, bool], input_names: Set[str]) -> None:
        super().__init__(autowrap_functions=tuple(f for f in get_notrace_functions() if callable(f)))
        self.leaves, self.modes, self.input_names = leaves, modes, input_names
        self.branches: set[str] = set()
        self.call_stack: list[str] = []
        self.constant_names: set[str] = set()
        self._parameter_proxies: dict[str, fx.Proxy] = {}
        self._patcher = _Patcher()

    @property
    def failed_path(self) -> str:
        """The module whose forward was running last, which does not trace after an error."""
        return self.call_stack[-1] if self.call_stack else ""

    @property
    def constants(self) -> dict[str, Tensor]:
        """The tensors of the graph that are not attributes of the model, by name; they are attributes of the root."""
        return {name: getattr(self.root, name) for name in self.constant_names}

    def trace_forward(self, root: nn.Module) -> fx.Graph:
        """The graph of the root's forward, be it its class's or one set on the instance.

        Functions that torch.fx and timm wrap are replaced meanwhile by wrappers that change nothing for other callers.
        """
        self.root, self.root_module_name = root, root._get_name()
        self.graph = fx.Graph(tracer_cls=fx.Tracer)
        with intercepted(root, self), recorded_regions() as self._regions:
            self.submodule_paths = {module: path for path, module in root.named_modules()}
            self._paths = {id(module): path for path, module in root.named_modules()}
            self._parameter_names = {id(p): name for name, p in root.named_parameters()}
            self.tensor_attrs = {
                value: join_path(path, name)
                for path, module in root.named_modules()
                for name, value in vars(module).items()
                if isinstance(value, Tensor)
            }
            function, takes_self = _forward_function(root)
            call, args = self.create_args_for_root(function, takes_self)
            with WRAPPING, self._patcher:
                _patch_wrapped_functions(self._patcher)
                _autowrap_check(self._patcher, math.__dict__, self._autowrap_function_ids)
                _autowrap_check(self._patcher, function.__globals__, self._autowrap_function_ids)
                annotations = inspect.get_annotations(inspect.unwrap(function))
                result = (self.create_arg(call(*args)),)
                self.create_node("output", "output", result, {}, type_expr=annotations.get("return"))
        return self.graph

    def intercept_call(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The result of a module's call: a node for a leaf, else what its forward returns."""
        self._check_region()
        path = self.path_of_module(module)
        if not path and has_hooks(module):
            raise TypeError("it calls itself, and has hooks")
        forward = getattr(module, "forward", module)
        _autowrap_check(self._patcher, getattr(forward, "__globals__", {}), self._autowrap_function_ids)
        self.call_stack.append(path)
        if self.call_stack.count(path) > MAX_RECURSION:
            raise RecursionError(f"it calls itself more than {MAX_RECURSION} times within one call")
        result = self.call_module(module, call, args, kwargs)
        self.call_stack.pop()  # not in a `finally`: after an error the top names the module that does not trace
        return result

    def intercept_attribute(self, value: Any) -> Any:
        """A node for a parameter; any other attribute itself."""
        path = self._parameter_names.get(id(value)) if isinstance(value, nn.Parameter) else None
        if path is None:
            return value
        if path not in self._parameter_proxies:
            self._parameter_proxies[path] = self.create_proxy("get_attr", path, (), {})
        return self._parameter_proxies[path]

    def intercept_mode(self, module: nn.Module) -> fx.Proxy | bool:
        """A node that reads the module's mode; the mode itself for a module that is not in the model."""
        mode: bool = module.__dict__["training"]
        path = None if isinstance(module, TrainingFlag) else self._paths.get(id(module))
        if path is None:
            return mode
        if MODE_PATH not in module._modules:
            module._modules[MODE_PATH] = TrainingFlag().train(mode)
        return self.create_proxy("call_module", join_path(path, MODE_PATH), (), {})

    def to_bool(self, obj: fx.Proxy) -> bool:
        path, _, name = str(obj.node.target).rpartition(".")
        if obj.node.op == "call_module" and name == MODE_PATH:
            is_own_mode = path == self.failed_path
            module = self.root.get_submodule(path)
            if not path or not is_own_mode or any(isinstance(m, nn.Conv2d) for m in module.modules()):
                self.branches.add(path)
                return self.modes.get(path, bool(module.__dict__["training"]))
        return super().to_bool(obj)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.leaves
            or is_notrace(m)
            or has_hooks(m)
            or isinstance(m, nn.Conv2d | Linear | ScriptedStandIn)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        self._check_region()
        return super().create_node(kind, target, *args, **kwargs)

    def create_arg(self, a: object) -> Any:
        if isinstance(a, dict) and type(a) not in PLAIN_DICTS:
            raise TypeError(f"it creates a {type(a).__name__}, which a graph would replace by a plain dict")
        return super().create_arg(a)

    def get_fresh_qualname(self, prefix: str) -> str:
        name = super().get_fresh_qualname(prefix)
        self.constant_names.add(name)
        return name

    def _check_region(self) -> None:
        if not self._regions.is_default():
            raise TypeError("a part of it runs in another gradient mode or autocast state than the rest")

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


def _forward_function(root: nn.Module) -> tuple[types.FunctionType, bool]:
    """The function of a module's forward, and whether its first argument is the module."""
    forward: Any = vars(root).get("forward", type(root).forward)
    takes_self = "forward" not in vars(root)
    if isinstance(forward, types.MethodType) and forward.__self__ is root:
        forward, takes_self = forward.__func__, True
    if not isinstance(forward, types.FunctionType):
        raise TypeError(f"its forward is a {type(forward).__name__}")
    return forward, takes_self
