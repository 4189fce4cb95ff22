"""Traced modules as JSON data and tensors, and back: graphs, classes and attributes of leaves, no code, no pickle."""

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
from ghostify.graph.methods import PRESERVED_KEY, RESULT, Mark, TracedModule, mark_method, method_marks, set_attributes
from ghostify.graph.paths import join_path
from ghostify.graph.tensor_needs import tensor_facts
from ghostify.imports import import_object
from ghostify.modules.hooks import has_hooks

ALLOWED_PACKAGES = ("torch", "torchvision", "timm", "ghostify")
STANDARD_MODULES = ("_operator", "math", "builtins")
BUILTINS = ("getattr", "len", "min", "max", "sum", "abs", "int", "float", "bool", "round", "tuple", "list", "slice")
FUNCTION_MODULES = (
    "torch.nn.functional", "torch._C._nn", "torch._C._special", "torch._C._linalg", "torch._C._fft",
    "torch.functional", "_operator", "math", "timm.", "torchvision.ops", "torchvision.models", "torchvision.transforms",
    "ghostify.graph.symbolic_tracer", "ghostify.modules.ghost",
)  # fmt: skip
TORCH_FUNCTIONS = ("_assert", "sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite")
FORBIDDEN = ("from_file", "save", "load")
MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
DERIVED = ("_flat_weights", "_flat_weight_refs")  # recurrent layers compute these from their parameters
UNSAVABLE_REMEDY = "Remove the attribute, or make it a submodule or buffer."


def serialize_module(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The module as JSON data, and its tensors by path.

    Raises `GhostifyError` for a module with hooks and for attributes that JSON cannot express.
    """
    tensors: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    first_paths: dict[int, str] = {}
    for path, inner in module.named_modules(remove_duplicate=False):
        if id(inner) in first_paths:
            modules[path] = {"same": first_paths[id(inner)]}
            continue
        first_paths[id(inner)] = path
        modules[path] = _serialize_one(path, inner, tensors)
    aliases = _aliases(module)
    return {"modules": modules, "aliases": aliases}, {k: v for k, v in tensors.items() if k not in aliases}


def deserialize_module(data: dict[str, Any], tensors: dict[str, Tensor], allow: Iterable[str] = ()) -> nn.Module:
    """The module that `serialize_module` serialized.

    Classes and functions are imported from torch, torchvision, timm, ghostify and the packages in `allow` only. Raises
    `GhostifyError` for any other name and for data that is not a model's.
    """
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
        traced = TracedModule(built[path], _build_graph(item["nodes"], names), class_name=item["class_name"])
        set_attributes(traced, {k: _decode(v, tensors, names) for k, v in item.get("attributes", {}).items()})
        built[path] = traced
        if path:
            owner, _, leaf = path.rpartition(".")
            built[owner]._modules[leaf] = traced
    root = built[""]
    for path, inner in root.named_modules():
        inner.training = data["modules"][path]["training"]
    return root


def is_serializable(value: Any) -> bool:
    """Whether JSON data can express a value."""
    try:
        _encode(value, "")
    except (GhostifyError, RecursionError):
        return False
    return True


def _serialize_one(path: str, inner: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if has_hooks(inner):
        raise GhostifyError(f"{path or 'the model'}: has hooks, which cannot be saved. Remove them first.")
    item: dict[str, Any] = {"training": inner.training, "parameters": {}, "buffers": {}}
    for name, parameter in inner._parameters.items():
        item["parameters"][name] = None if parameter is None else tensor_facts(parameter)
        if parameter is not None:
            tensors[join_path(path, name)] = parameter
    for name, buffer in inner._buffers.items():
        persistent = name not in inner._non_persistent_buffers_set
        item["buffers"][name] = None if buffer is None else {**tensor_facts(buffer), "persistent": persistent}
        if buffer is not None:
            tensors[join_path(path, name)] = buffer
    if isinstance(inner, fx.GraphModule):
        item["class_name"] = type(inner).__name__
        item["nodes"] = [_serialize_node(n) for n in inner.graph.nodes]
        preserved = inner.meta.get(PRESERVED_KEY, {})
        item["attributes"] = {key: _encode(value, join_path(path, key)) for key, value in preserved.items()}
        return item
    item["class"] = _import_name(type(inner), f"{path}: its class")
    item["attributes"] = {
        key: _encode(value, join_path(path, key), tensors)
        for key, value in inner.__dict__.items()
        if key not in MODULE_INTERNALS
        and key not in ("training", "meta")
        and not (isinstance(inner, nn.RNNBase) and key in DERIVED)
    }
    return item


def _serialize_node(node: fx.Node) -> dict[str, Any]:
    where = f"node {node.name}"
    target = _import_name(node.target, where) if node.op == "call_function" else node.target
    marks = sorted(method_marks(node))
    return {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": [_encode(a, where) for a in node.args],
        "kwargs": {k: _encode(v, where) for k, v in node.kwargs.items()},
        **({"marks": [list(m) for m in marks]} if marks else {}),
    }


def _aliases(module: nn.Module) -> dict[str, str]:
    """Paths of tensors that have an earlier path too, with that path."""
    first_paths: dict[int, str] = {}
    aliases: dict[str, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for path, tensor in named:
        if first_paths.setdefault(id(tensor), path) != path:
            aliases[path] = first_paths[id(tensor)]
    return aliases


def _build_leaf(
    path: str,
    item: dict[str, Any],
    tensors: dict[str, Tensor],
    parameters: dict[int, nn.Parameter],
    names: _AllowedImports,
) -> nn.Module:
    """A module of the stored class with its attributes and tensors; its constructor is not called."""
    leaf: nn.Module
    if "nodes" in item:
        leaf = nn.Module()
    else:
        cls = names.module_class(item["class"])
        leaf = cls.__new__(cls)
        nn.Module.__init__(leaf)
        leaf.__dict__.update({k: _decode(v, tensors, names) for k, v in item["attributes"].items()})
    for name, facts in item["parameters"].items():
        tensor = None if facts is None else _stored_tensor(tensors, path, name)
        if tensor is not None and id(tensor) not in parameters:
            parameters[id(tensor)] = nn.Parameter(_contiguous_copy(tensor, facts), requires_grad=facts["requires_grad"])
        leaf._parameters[name] = None if tensor is None else parameters[id(tensor)]
    for name, facts in item["buffers"].items():
        buffer = None if facts is None else _contiguous_copy(_stored_tensor(tensors, path, name), facts)
        leaf.register_buffer(name, buffer, persistent=facts is None or facts["persistent"])
    if isinstance(leaf, nn.RNNBase):
        leaf._init_flat_weights()
    return leaf


def _stored_tensor(tensors: dict[str, Tensor], path: str, name: str) -> Tensor:
    key = join_path(path, name)
    if key not in tensors:
        raise GhostifyError(f"tensor {key}: is missing")
    return tensors[key]


def _contiguous_copy(tensor: Tensor, facts: dict[str, Any]) -> Tensor:
    """A copy in the stored memory format: views of a file may be aligned so that kernels round differently."""
    return tensor.clone(memory_format=torch.channels_last if facts["channels_last"] else torch.contiguous_format)


def _build_graph(items: list[dict[str, Any]], names: _AllowedImports) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in items:
        target: Any = item["target"]
        if item["op"] == "call_function":
            target = names.function(target)
        elif item["op"] == "call_method":
            names.check_method(target)
        args = tuple(_decode(a, nodes, names) for a in item["args"])
        kwargs = {k: _decode(v, nodes, names) for k, v in item["kwargs"].items()}
        if target is getattr and (len(args) < 2 or not isinstance(args[1], str) or args[1].startswith("_")):
            raise GhostifyError(f"node {item['name']}: reads an attribute that is not allowed in a saved model")
        node = nodes[item["name"]] = graph.create_node(item["op"], target, args, kwargs, name=item["name"])
        if "marks" in item:
            mark_method(node, *(_mark(m) for m in item["marks"]))
    return graph


def _mark(pair: Any) -> Mark:
    """A stored mark, whose names are valid names of a method and of its parameter."""
    method, parameter = pair
    name = str(method)
    is_method_name = name.isidentifier() and not name.startswith("_") and not hasattr(nn.Module, name)
    if not is_method_name or not (parameter == RESULT or str(parameter).isidentifier()):
        raise GhostifyError(f"method {method!r}: is not allowed in a saved model")
    return Mark(method, parameter)


def _encode(value: Any, where: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """A value as JSON data; its tensors are added to `tensors` under new keys."""
    if isinstance(value, Tensor) and tensors is not None:
        key = f"{where}:{len(tensors)}"
        tensors[key] = value
        return {"tensor": key}
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, enum.Enum):
        return {"enum": [_import_name(type(value), where), value.name]}
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
    def encode_each(values: Iterable[Any]) -> list[Any]:
        return [_encode(v, where, tensors) for v in values]

    if isinstance(value, list):
        return encode_each(value)
    for kind, cls in (("size", torch.Size), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, cls) and not hasattr(value, "_fields"):
            return {kind: encode_each(value)}
    if isinstance(value, dict):
        kind = "ordered" if isinstance(value, OrderedDict) else "dict"
        return {kind: [encode_each(pair) for pair in value.items()]}
    if isinstance(value, slice):
        return {"slice": encode_each((value.start, value.stop, value.step))}
    return None


def _encode_callable(value: Any, where: str, tensors: dict[str, Tensor] | None) -> Any:
    if isinstance(value, functools.partial):
        return {
            "partial": [
                _import_name(value.func, where),
                *(_encode(v, where) for v in (list(value.args), value.keywords)),
            ]
        }
    if isinstance(value, type):
        return {"class": _import_name(value, where)}
    if isinstance(value, nn.Module | types.MethodType):
        raise GhostifyError(
            f"{where}: holds a {type(value).__name__} that is not a registered submodule, which cannot be saved. "
            f"{UNSAVABLE_REMEDY}"
        )
    if callable(value) and hasattr(value, "__qualname__"):
        return {"function": _import_name(value, where)}
    if (
        type(value).__reduce_ex__ is object.__reduce_ex__
        and hasattr(value, "__dict__")
        and not isinstance(value, tuple)
    ):
        attributes = {k: _encode(v, f"{where}.{k}", tensors) for k, v in vars(value).items()}
        return {"object": [_import_name(type(value), where), attributes]}
    raise GhostifyError(f"{where}: a value of class {type(value).__name__} cannot be saved. {UNSAVABLE_REMEDY}")


def _decode(value: Any, references: Mapping[str, Any], names: _AllowedImports) -> Any:
    """The inverse of `_encode`; `references` has the graph's nodes by name, or the tensors by key."""

    def decode_each(values: Iterable[Any]) -> list[Any]:
        return [_decode(v, references, names) for v in values]

    def instance() -> Any:
        decoded: Any = object.__new__(names.plain_class(inner[0]))
        decoded.__dict__.update({k: _decode(v, references, names) for k, v in inner[1].items()})
        return decoded

    if isinstance(value, list):
        return decode_each(value)
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    decoders: dict[str, Callable[[], Any]] = {
        "float": lambda: float(inner),
        "node": lambda: references[inner],
        "tensor": lambda: references[inner].clone(),
        "object": instance,
        "enum": lambda: names.load(inner[0])[inner[1]],
        "dtype": lambda: _torch_constant(inner, torch.dtype),
        "memory_format": lambda: _torch_constant(inner, torch.memory_format),
        "device": lambda: torch.device(inner),
        "size": lambda: torch.Size(inner),
        "tuple": lambda: tuple(decode_each(inner)),
        "set": lambda: set(decode_each(inner)),
        "frozenset": lambda: frozenset(decode_each(inner)),
        "ordered": lambda: OrderedDict(decode_each(inner)),
        "dict": lambda: dict(decode_each(inner)),
        "slice": lambda: slice(*decode_each(inner)),
        "ellipsis": lambda: Ellipsis,
        "partial": lambda: functools.partial(
            names.callable(inner[0]), *decode_each(inner[1]), **_decode(inner[2], references, names)
        ),
        "class": lambda: names.callable(inner),
        "function": lambda: names.callable(inner),
    }
    if kind not in decoders:
        raise GhostifyError(f"value of kind {kind!r}: is not known")
    return decoders[kind]()


def _torch_constant(name: str, cls: type) -> Any:
    constant = getattr(torch, name, None)
    if not isinstance(constant, cls):
        raise GhostifyError(f"torch.{name}: is not a {cls.__name__}")
    return constant


def _import_name(value: Any, where: str) -> str:
    """The name "module:qualified name" by which a class or function can be imported."""
    module = getattr(value, "__module__", None) or ""
    name = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    if isinstance(value, types.BuiltinFunctionType | types.BuiltinMethodType) and not module.startswith("_operator"):
        owner = getattr(value, "__self__", None)
        name = value.__name__
        module = owner.__name__ if isinstance(owner, types.ModuleType) else "torch"
        if module in ("torch", "") and getattr(torch, name, None) is not value:
            module = "torch.nn.functional"
    if "<locals>" in name and module == "torch.nn.functional":  # wrappers of two functions, such as max_pool2d
        name = next((k for k, v in vars(torch.nn.functional).items() if v is value), name)
    import_name = f"{module}:{name}"
    try:
        imported = import_object(import_name)
    except (ImportError, AttributeError, ValueError):
        imported = None
    if imported is not value:
        raise GhostifyError(
            f"{where}: {module}.{name} cannot be imported by that name, so it cannot be saved. "
            f"Define it at the top level of a module."
        )
    return import_name


class _AllowedImports:
    """Imports the classes and functions that a saved model may name, from allowed packages only."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def load(self, name: str) -> Any:
        """The object "module:qualified name"; raises `GhostifyError` for a package that is not allowed."""
        module = name.partition(":")[0]
        package = module.partition(".")[0]
        if package not in (*self.packages, *STANDARD_MODULES):
            raise GhostifyError(
                f"{name}: is not in an allowed package ({', '.join(self.packages)}). "
                f"If you trust it, use load(..., allow=[{package!r}]), or --allow {package}."
            )
        try:
            return import_object(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise GhostifyError(f"{name}: is not installed ({error}). Install it.") from error

    def module_class(self, name: str) -> type[nn.Module]:
        """A subclass of `nn.Module`."""
        cls = self.load(name)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise GhostifyError(f"{name}: is not a subclass of nn.Module")
        return cls

    def plain_class(self, name: str) -> type:
        """A class that is not a module's, of which an instance may be created."""
        cls = self.function(name)
        if not isinstance(cls, type) or issubclass(cls, nn.Module):
            raise GhostifyError(f"{name}: is not a plain class")
        return cls

    def callable(self, name: str) -> Any:
        """A module class, or what `function` allows."""
        loaded = self.load(name)
        return loaded if isinstance(loaded, type) and issubclass(loaded, nn.Module) else self.function(name)

    def function(self, name: str) -> Any:
        """A function or class that a graph may call; any of a package that the user allows."""
        loaded = self.load(name)
        module, _, attribute = name.partition(":")
        is_torch_function = isinstance(loaded, types.BuiltinFunctionType) or attribute in TORCH_FUNCTIONS
        is_allowed = (
            module.partition(".")[0] not in (*ALLOWED_PACKAGES, *STANDARD_MODULES)
            or (module == "builtins" and attribute in BUILTINS)
            or (module == "torch" and is_torch_function)
            or module.startswith(FUNCTION_MODULES)
        )
        if not is_allowed or attribute in FORBIDDEN:
            raise GhostifyError(f"{name}: is not allowed in a saved model")
        return loaded

    def check_method(self, name: Any) -> None:
        """Raise `GhostifyError` where no type of value in a graph has a public method of that name."""
        if (
            not isinstance(name, str)
            or name.startswith("_")
            or not any(hasattr(cls, name) for cls in (Tensor, list, dict, tuple, str, int, float))
        ):
            raise GhostifyError(f"method {name!r}: is not allowed in a saved model")
