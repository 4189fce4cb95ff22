"""A traced module as plain data and back: its graph, its leaves' classes and attributes - no code, no pickle."""

from __future__ import annotations

import enum
import functools
import math
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.errors import GhostifyError
from ghostify.graph.methods import KEPT, RESULT, Mark, TracedModule, mark_method, method_marks, set_attributes
from ghostify.graph.paths import join_path
from ghostify.imports import import_object
from ghostify.modules.ghost import is_channels_last
from ghostify.modules.hooks import has_hooks

ALLOWED_PACKAGES = ("torch", "torchvision", "timm", "ghostify")
BUILTINS = ("getattr", "len", "min", "max", "sum", "abs", "int", "float", "bool", "round", "tuple", "list", "slice")
FUNCTION_MODULES = (
    "torch.nn.functional", "torch._C._nn", "torch._C._special", "torch._C._linalg", "torch._C._fft",
    "torch.functional", "_operator", "math", "timm.", "torchvision.ops", "torchvision.models", "torchvision.transforms",
    "ghostify.graph.symbolic_tracer", "ghostify.modules.ghost",
)  # fmt: skip
TORCH_FUNCTIONS = ("_assert", "sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite")
FORBIDDEN = ("from_file", "save", "load")
MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
DERIVED = ("_flat_weights", "_flat_weight_refs")  # what recurrent layers make of their parameters


def serialize_module(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The module as JSON-ready data, and its tensors by path.

    Raises `GhostifyError` for a leaf that holds hooks or attributes that plain data cannot say.
    """
    tensors: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    first: dict[int, str] = {}
    for path, inner in module.named_modules(remove_duplicate=False):
        if id(inner) in first:
            modules[path] = {"same": first[id(inner)]}
            continue
        first[id(inner)] = path
        modules[path] = _describe_one(path, inner, tensors)
    aliases = _aliases(module)
    return {"modules": modules, "aliases": aliases}, {k: v for k, v in tensors.items() if k not in aliases}


def deserialize_module(data: dict[str, Any], tensors: dict[str, Tensor], allow: Iterable[str] = ()) -> nn.Module:
    """The inverse of `serialize_module`. Classes and functions come from torch, torchvision, timm and what `allow`
    names."""
    names = _AllowedImports((*ALLOWED_PACKAGES, *allow))
    tensors = dict(tensors)
    for alias, path in data["aliases"].items():
        tensors[alias] = tensors[path]
    parameters: dict[int, nn.Parameter] = {}
    built: dict[str, nn.Module] = {}
    for path, item in data["modules"].items():
        built[path] = built[item["same"]] if "same" in item else _build_leaf(path, item, tensors, parameters, names)
        if path:
            owner, _, leaf = path.rpartition(".")
            built[owner]._modules[leaf] = built[path]
    graphs = [p for p, item in data["modules"].items() if "nodes" in item]
    for path in reversed(graphs):
        item = data["modules"][path]
        made = TracedModule(built[path], _graph(item["nodes"], names), class_name=item["class_name"])
        set_attributes(made, {k: _decode(v, tensors, names) for k, v in item.get("attributes", {}).items()})
        built[path] = made
        if path:
            owner, _, leaf = path.rpartition(".")
            built[owner]._modules[leaf] = made
    root = built[""]
    for path, inner in root.named_modules():
        inner.training = data["modules"][path]["training"]
    return root


def is_serializable(value: Any) -> bool:
    """Whether plain data can say it."""
    try:
        _encode(value, "")
    except (GhostifyError, RecursionError):
        return False
    return True


def _describe_one(path: str, inner: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if has_hooks(inner):
        raise GhostifyError(f"{path or 'the model'} carries hooks, which cannot be saved: remove them first")
    item: dict[str, Any] = {"training": inner.training, "parameters": {}, "buffers": {}}
    for name, parameter in inner._parameters.items():
        item["parameters"][name] = None if parameter is None else _tensor_facts(parameter)
        if parameter is not None:
            tensors[join_path(path, name)] = parameter
    for name, buffer in inner._buffers.items():
        persistent = name not in inner._non_persistent_buffers_set
        item["buffers"][name] = None if buffer is None else {**_tensor_facts(buffer), "persistent": persistent}
        if buffer is not None:
            tensors[join_path(path, name)] = buffer
    if isinstance(inner, fx.GraphModule):
        item["class_name"] = type(inner).__name__
        item["nodes"] = [_describe_node(n) for n in inner.graph.nodes]
        kept = inner.meta.get(KEPT, {})
        item["attributes"] = {key: _encode(value, join_path(path, key)) for key, value in kept.items()}
        return item
    item["class"] = _name(type(inner), f"{path}: its class")
    item["attributes"] = {
        key: _encode(value, join_path(path, key), tensors)
        for key, value in inner.__dict__.items()
        if key not in MODULE_INTERNALS
        and key not in ("training", "meta")
        and not (isinstance(inner, nn.RNNBase) and key in DERIVED)
    }
    return item


def _describe_node(node: fx.Node) -> dict[str, Any]:
    where = f"node {node.name}"
    target = _name(node.target, where) if node.op == "call_function" else node.target
    marks = sorted(method_marks(node))
    return {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": [_encode(a, where) for a in node.args],
        "kwargs": {k: _encode(v, where) for k, v in node.kwargs.items()},
        **({"marks": [list(m) for m in marks]} if marks else {}),
    }


def _tensor_facts(tensor: Tensor) -> dict[str, Any]:
    return {"requires_grad": tensor.requires_grad, "channels_last": is_channels_last(tensor)}


def _aliases(module: nn.Module) -> dict[str, str]:
    """Paths of tensors that are another path's tensor."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for path, tensor in named:
        if first.setdefault(id(tensor), path) != path:
            aliases[path] = first[id(tensor)]
    return aliases


def _build_leaf(
    path: str,
    item: dict[str, Any],
    tensors: dict[str, Tensor],
    parameters: dict[int, nn.Parameter],
    names: _AllowedImports,
) -> nn.Module:
    """A module of the described class with its attributes and tensors, its constructor not called."""
    made: nn.Module
    if "nodes" in item:
        made = nn.Module()
    else:
        cls = names.module_class(item["class"])
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.__dict__.update({k: _decode(v, tensors, names) for k, v in item["attributes"].items()})
    for name, facts in item["parameters"].items():
        tensor = None if facts is None else _take(tensors, path, name)
        if tensor is not None and id(tensor) not in parameters:
            parameters[id(tensor)] = nn.Parameter(_laid_out(tensor, facts), requires_grad=facts["requires_grad"])
        made._parameters[name] = None if tensor is None else parameters[id(tensor)]
    for name, facts in item["buffers"].items():
        buffer = None if facts is None else _laid_out(_take(tensors, path, name), facts)
        made.register_buffer(name, buffer, persistent=facts is None or facts["persistent"])
    if isinstance(made, nn.RNNBase):
        made._init_flat_weights()
    return made


def _take(tensors: dict[str, Tensor], path: str, name: str) -> Tensor:
    key = join_path(path, name)
    if key not in tensors:
        raise GhostifyError(f"tensor {key} is missing")
    return tensors[key]


def _laid_out(tensor: Tensor, facts: dict[str, Any]) -> Tensor:
    """The tensor in memory of its own: views into a file may be aligned so that kernels round differently."""
    return tensor.clone(memory_format=torch.channels_last if facts["channels_last"] else torch.contiguous_format)


def _graph(items: list[dict[str, Any]], names: _AllowedImports) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in items:
        target: Any = item["target"]
        if item["op"] == "call_function":
            target = names.function(target)
        elif item["op"] == "call_method":
            names.method(target)
        args = tuple(_decode(a, nodes, names) for a in item["args"])
        kwargs = {k: _decode(v, nodes, names) for k, v in item["kwargs"].items()}
        if target is getattr and (len(args) < 2 or not isinstance(args[1], str) or args[1].startswith("_")):
            raise GhostifyError(f"node {item['name']}: reads an attribute that a model has no use for")
        made = nodes[item["name"]] = graph.create_node(item["op"], target, args, kwargs, name=item["name"])
        if "marks" in item:
            mark_method(made, *(_mark(m) for m in item["marks"]))
    return graph


def _mark(pair: Any) -> Mark:
    """A mark that was saved; its names become those of a method and of its parameter."""
    name, part = pair
    fits = str(name).isidentifier() and not str(name).startswith("_") and not hasattr(nn.Module, str(name))
    if not fits or not (part == RESULT or str(part).isidentifier()):
        raise GhostifyError(f"marks a node as part of {name!r}, which can be no method of a model")
    return Mark(name, part)


def _encode(value: Any, where: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """A value as plain data; tensors go into `tensors`, under a path of their own."""
    if isinstance(value, Tensor) and tensors is not None:
        key = f"{where}:{len(tensors)}"
        tensors[key] = value
        return {"tensor": key}
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, enum.Enum):
        return {"enum": [_name(type(value), where), value.name]}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype | torch.device | torch.memory_format):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if value is Ellipsis:
        return {"ellipsis": True}
    encoded = _encode_container(value, where, tensors)
    return _encode_callable(value, where, tensors) if encoded is None else encoded


def _encode_container(value: Any, where: str, tensors: dict[str, Tensor] | None) -> Any:
    def every(values: Iterable[Any]) -> list[Any]:
        return [_encode(v, where, tensors) for v in values]

    if isinstance(value, list):
        return every(value)
    for kind, cls in (("size", torch.Size), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, cls) and not hasattr(value, "_fields"):
            return {kind: every(value)}
    if isinstance(value, dict):
        kind = "ordered" if isinstance(value, OrderedDict) else "dict"
        return {kind: [every(pair) for pair in value.items()]}
    if isinstance(value, slice):
        return {"slice": every((value.start, value.stop, value.step))}
    return None


def _encode_callable(value: Any, where: str, tensors: dict[str, Tensor] | None) -> Any:
    if isinstance(value, functools.partial):
        return {"partial": [_name(value.func, where), *(_encode(v, where) for v in (list(value.args), value.keywords))]}
    if isinstance(value, type):
        return {"class": _name(value, where)}
    if isinstance(value, nn.Module | types.MethodType):
        raise GhostifyError(f"{where}: holds a {type(value).__name__} beside its submodules, which cannot be saved")
    if callable(value) and hasattr(value, "__qualname__"):
        return {"function": _name(value, where)}
    if (
        type(value).__reduce_ex__ is object.__reduce_ex__
        and hasattr(value, "__dict__")
        and not isinstance(value, tuple)
    ):
        own = {k: _encode(v, f"{where}.{k}", tensors) for k, v in vars(value).items()}
        return {"object": [_name(type(value), where), own]}
    raise GhostifyError(f"{where}: a {type(value).__name__} cannot be saved as plain data")


def _decode(value: Any, known: Mapping[str, Any], names: _AllowedImports) -> Any:
    """The inverse of `_encode`; `known` has the graph's nodes, or the tensors."""

    def every(values: Iterable[Any]) -> list[Any]:
        return [_decode(v, known, names) for v in values]

    def instance() -> Any:
        made: Any = object.__new__(names.plain_class(inner[0]))
        made.__dict__.update({k: _decode(v, known, names) for k, v in inner[1].items()})
        return made

    if isinstance(value, list):
        return every(value)
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    made: dict[str, Callable[[], Any]] = {
        "float": lambda: float(inner),
        "node": lambda: known[inner],
        "tensor": lambda: known[inner].clone(),
        "object": instance,
        "enum": lambda: names.of(inner[0])[inner[1]],
        "dtype": lambda: _torch_constant(inner, torch.dtype),
        "memory_format": lambda: _torch_constant(inner, torch.memory_format),
        "device": lambda: torch.device(inner),
        "size": lambda: torch.Size(inner),
        "tuple": lambda: tuple(every(inner)),
        "set": lambda: set(every(inner)),
        "frozenset": lambda: frozenset(every(inner)),
        "ordered": lambda: OrderedDict(every(inner)),
        "dict": lambda: dict(every(inner)),
        "slice": lambda: slice(*every(inner)),
        "ellipsis": lambda: Ellipsis,
        "partial": lambda: functools.partial(
            names.callable(inner[0]), *every(inner[1]), **_decode(inner[2], known, names)
        ),
        "class": lambda: names.callable(inner),
        "function": lambda: names.callable(inner),
    }
    if kind not in made:
        raise GhostifyError(f"holds an unknown kind of value, {kind!r}")
    return made[kind]()


def _torch_constant(name: str, cls: type) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, cls):
        raise GhostifyError(f"torch.{name} is not a {cls.__name__}")
    return found


def _name(value: Any, where: str) -> str:
    """The name under which importing finds this class or function again."""
    module = getattr(value, "__module__", None) or ""
    name = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    if isinstance(value, types.BuiltinFunctionType | types.BuiltinMethodType) and not module.startswith("_operator"):
        owner = getattr(value, "__self__", None)
        name = value.__name__
        module = owner.__name__ if isinstance(owner, types.ModuleType) else "torch"
        if module in ("torch", "") and getattr(torch, name, None) is not value:
            module = "torch.nn.functional"
    if "<locals>" in name and module == "torch.nn.functional":  # functions that it makes of two, such as max_pool2d
        name = next((k for k, v in vars(torch.nn.functional).items() if v is value), name)
    full = f"{module}:{name}"
    try:
        found = import_object(full)
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not value:
        raise GhostifyError(
            f"{where}: {module}.{name} cannot be imported by that name, so it cannot be saved: "
            f"define it at the top level of a module"
        )
    return full


class _AllowedImports:
    """Looks up classes and functions by name, in known packages only, and only such as models are made of."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def of(self, full: str) -> Any:
        module = full.partition(":")[0]
        root = module.partition(".")[0]
        if root not in (*self.packages, "_operator", "math", "builtins"):
            raise GhostifyError(
                f"names {full}, which is not of {', '.join(self.packages)}: load(..., allow=[{root!r}]), "
                f"or --allow {root}"
            )
        try:
            return import_object(full)
        except (ImportError, AttributeError, ValueError) as error:
            raise GhostifyError(f"names {full}, which is not installed here: {error}") from error

    def module_class(self, full: str) -> type[nn.Module]:
        found = self.of(full)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise GhostifyError(f"names {full} as a layer, which is no nn.Module")
        return found

    def plain_class(self, full: str) -> type:
        found = self.function(full)
        if not isinstance(found, type) or issubclass(found, nn.Module):
            raise GhostifyError(f"names {full} as an object's class, which is none")
        return found

    def callable(self, full: str) -> Any:
        found = self.of(full)
        return found if isinstance(found, type) and issubclass(found, nn.Module) else self.function(full)

    def function(self, full: str) -> Any:
        found = self.of(full)
        module, _, name = full.partition(":")
        user = not any(module.partition(".")[0] == p for p in (*ALLOWED_PACKAGES, "_operator", "math", "builtins"))
        known = (
            user
            or (module == "builtins" and name in BUILTINS)
            or (module == "torch" and (isinstance(found, types.BuiltinFunctionType) or name in TORCH_FUNCTIONS))
            or module.startswith(FUNCTION_MODULES)
        )
        if not known or name in FORBIDDEN:
            raise GhostifyError(f"calls {full}, which a model has no use for")
        return found

    def method(self, name: Any) -> None:
        if (
            not isinstance(name, str)
            or name.startswith("_")
            or not any(hasattr(cls, name) for cls in (Tensor, list, dict, tuple, str, int, float))
        ):
            raise GhostifyError(f"calls the method {name!r}, which a model has no use for")
