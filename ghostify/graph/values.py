"""Values as JSON data, and back: constants, containers, nodes and tensors by key, classes and functions by name."""

from __future__ import annotations

import enum
import functools
import keyword
import math
import types
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.errors import GhostifyError
from ghostify.graph.allowed_ops import AllowedNames
from ghostify.graph.module_state import MODULE_INTERNALS
from ghostify.imports import import_name, is_importable

UNSAVABLE_REMEDY = "Remove the attribute, or make it a submodule or buffer."
NOT_SAVED = MODULE_INTERNALS | {"meta"}  # attributes of modules
MAX_DEPTH = 32
MAX_INTEGER = 2**64
NAME_KINDS = ("class", "function")
NAME_AND_VALUE_KINDS = ("partial", "object", "enum")
ATTRIBUTE_KINDS = frozenset({
    "float", "tensor", "object", "enum", "dtype", "memory_format", "device", "size", "tuple", "set", "frozenset",
    "ordered", "dict", "slice", "ellipsis", "partial", "class", "function",
})  # fmt: skip
ARGUMENT_KINDS = frozenset({
    "float", "node", "enum", "dtype", "memory_format", "device", "size", "tuple", "ordered", "dict", "slice",
    "ellipsis",
})  # fmt: skip
CUSTOM_ARGUMENT_KINDS = ARGUMENT_KINDS | {"class", "function"}


def encode(value: Any, where: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """A value as JSON data; its tensors are added to `tensors` under new keys.

    Raises `GhostifyError` for a value that JSON cannot express.
    """
    if isinstance(value, Tensor) and tensors is not None:
        key = f"{where}:{len(tensors)}"
        tensors[key] = value
        return {"tensor": key}
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, enum.Enum):
        return {"enum": [saved_name(type(value), where), value.name]}
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


def is_serializable(value: Any) -> bool:
    """Whether JSON data can express a value."""
    try:
        encode(value, "")
    except (GhostifyError, RecursionError):
        return False
    return True


def saved_name(value: Any, where: str) -> str:
    """The name by which a class or function is saved; raises `GhostifyError` where it cannot be imported by it."""
    name = import_name(value)
    if not is_importable(value):
        raise GhostifyError(
            f"{where}: {name.replace(':', '.')} cannot be imported by that name, so it cannot be saved. "
            f"Define it at the top level of a module."
        )
    return name


def _encode_container(value: Any, where: str, tensors: dict[str, Tensor] | None) -> Any:
    def encode_each(values: Iterable[Any]) -> list[Any]:
        return [encode(v, where, tensors) for v in values]

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
        arguments = (encode(v, where) for v in (list(value.args), value.keywords))
        return {"partial": [saved_name(value.func, where), *arguments]}
    if isinstance(value, type):
        return {"class": saved_name(value, where)}
    if isinstance(value, nn.Module | types.MethodType):
        raise GhostifyError(
            f"{where}: holds a {type(value).__name__} that is not a registered submodule, which cannot be saved. "
            f"{UNSAVABLE_REMEDY}"
        )
    if callable(value) and hasattr(value, "__qualname__"):
        return {"function": saved_name(value, where)}
    if (
        type(value).__reduce_ex__ is object.__reduce_ex__
        and hasattr(value, "__dict__")
        and not isinstance(value, tuple)
    ):
        attributes = {k: encode(v, f"{where}.{k}", tensors) for k, v in vars(value).items()}
        return {"object": [saved_name(type(value), where), attributes]}
    raise GhostifyError(f"{where}: a value of class {type(value).__name__} cannot be saved. {UNSAVABLE_REMEDY}")


def names_in(value: Any) -> Iterator[str]:
    """The names of classes and functions in JSON data that `encode` returned, or that claims so."""
    pending = [value]
    while pending:
        inner = pending.pop()
        if isinstance(inner, list):
            pending += reversed(inner)
        elif isinstance(inner, dict):
            for kind, content in inner.items():
                named = content if kind in NAME_KINDS else None
                if kind in NAME_AND_VALUE_KINDS and isinstance(content, list) and content:
                    named = content[0]
                if isinstance(named, str):
                    yield named
            pending += reversed(inner.values())


def tensor_keys(value: Any) -> Iterator[str]:
    """The keys of tensors in JSON data that `encode` returned, or that claims so."""
    match value:
        case {"tensor": str(key)}:
            yield key
        case {"object": [_, {**attributes}]}:
            yield from tensor_keys(list(attributes.values()))
        case {**kinds}:
            yield from tensor_keys(list(kinds.values()))
        case [*items]:
            for item in items:
                yield from tensor_keys(item)


def inner_texts(value: Any) -> Iterator[str]:
    """The texts within a container that is given as JSON data, keys of dicts among them; none for a text itself."""
    pending = [value] if isinstance(value, list | dict) else []
    while pending:
        inner = pending.pop()
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, list | dict):
            pending += inner.values() if isinstance(inner, dict) else inner


def is_attribute(cls: type, name: str, value: Any) -> bool:
    """Whether a saved instance of the class may have an attribute of that name; `value` is its JSON data.

    None replaces a method, a property or Python's own: where it has the name of one it is a plain constant.
    """
    if not is_identifier(name) or name.startswith("__") or name in NOT_SAVED or name == "forward":
        return False
    member = next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)
    is_method = hasattr(type(member), "__get__") or (callable(member) and not isinstance(member, type))
    is_own_name = is_method or hasattr(nn.Module, name)
    return not is_own_name or (
        not name.startswith("_") and (value is None or isinstance(value, bool | int | float | str))
    )


@dataclass(frozen=True)
class ValueReader:
    """Reads the JSON data of values of these kinds; `references` has the graph's nodes or the tensors by key.

    Listed classes are values only where it `accepts_class`: who calls one creates it with any arguments.

    Raises `GhostifyError` for anything else, and for texts that are not accepted.
    """

    where: str
    names: AllowedNames
    kinds: frozenset[str]
    references: Mapping[str, Any]
    accepts_text: Callable[[str], bool] = lambda _: True
    accepts_class: bool = False

    def read(self, value: Any, depth: int = 0) -> Any:
        """The value."""
        if depth > MAX_DEPTH:
            raise GhostifyError(f"{self.where}: is nested more than {MAX_DEPTH} deep")
        if isinstance(value, list):
            return self._each(value, depth)
        if isinstance(value, dict):
            if len(value) != 1:
                raise self._wrong(value)
            ((kind, inner),) = value.items()
            if kind not in self.kinds:
                raise GhostifyError(f"{self.where}: value of kind {kind!r}: is not known")
            return self._of_kind(kind, inner, depth + 1)
        if isinstance(value, str) and not self.accepts_text(value):
            raise GhostifyError(f"{self.where}: text {value[:40]!r} is not allowed here")
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise GhostifyError(f"{self.where}: a number is too large")
        return value

    def keywords(self, value: Any, depth: int = 0) -> dict[str, Any]:
        """The values by keyword."""
        if not isinstance(value, dict) or not all(map(is_identifier, value)):
            raise GhostifyError(f"{self.where}: has a keyword that is not a name")
        return {key: self.read(inner, depth) for key, inner in value.items()}

    def _each(self, values: Any, depth: int) -> list[Any]:
        if not isinstance(values, list):
            raise self._wrong(values)
        return [self.read(inner, depth + 1) for inner in values]

    def _of_kind(self, kind: str, inner: Any, depth: int) -> Any:
        match kind:
            case "tuple" | "set" | "frozenset" | "size" | "ordered" | "dict" | "slice":
                return self._container(kind, inner, depth)
            case "node" | "tensor":
                if not isinstance(inner, str) or inner not in self.references:
                    raise GhostifyError(f"{self.where}: refers to {kind} {inner!r}, which is not before it")
                return self.references[inner]
            case "float" if inner in ("inf", "-inf", "nan"):
                return float(inner)
            case "ellipsis":
                return Ellipsis
            case "dtype" | "memory_format":
                return self._torch_constant(inner, torch.dtype if kind == "dtype" else torch.memory_format)
            case "device" if isinstance(inner, str):
                return self._device(inner)
            case "class" | "function" if isinstance(inner, str):
                return self.names.value(inner, may_be_class=self.accepts_class)
            case "enum" | "object" | "partial" if isinstance(inner, list) and inner and isinstance(inner[0], str):
                return self._named(kind, inner, depth)
        raise self._wrong({kind: inner})

    def _container(self, kind: str, inner: Any, depth: int) -> Any:
        values = self._each(inner, depth)
        try:
            match kind:
                case "tuple":
                    return tuple(values)
                case "slice" if len(values) == 3:
                    return slice(*values)
                case "size" if all(type(v) is int and 0 <= v < 2**63 for v in values):
                    return torch.Size(values)
                case "set" | "frozenset":
                    return set(values) if kind == "set" else frozenset(values)
                case "ordered" | "dict" if all(isinstance(pair, list) and len(pair) == 2 for pair in values):
                    if not any(isinstance(key, fx.Node | Tensor) for key, _ in values):
                        return OrderedDict(values) if kind == "ordered" else dict(values)
        except TypeError as error:  # a list as a key
            raise self._wrong({kind: inner}) from error
        raise self._wrong({kind: inner})

    def _named(self, kind: str, inner: list[Any], depth: int) -> Any:
        match kind, inner:
            case "enum", [name, member]:
                return self.names.enum_member(name, member)
            case "object", [name, dict() as attributes]:
                instance: Any = object.__new__(self.names.plain_class(name))
                values = self.keywords(attributes, depth)
                if not all(is_attribute(type(instance), key, value) for key, value in attributes.items()):
                    raise GhostifyError(f"{self.where}: replaces a method of {name}")
                instance.__dict__.update(values)
                return instance
            case "partial", [name, list() as args, {"dict": list()} as keywords]:
                values = self.read(keywords, depth)
                if not all(isinstance(key, str) and is_identifier(key) for key in values):
                    raise self._wrong(keywords)
                return functools.partial(
                    self.names.value(name, may_be_class=self.accepts_class), *self._each(args, depth), **values
                )
        raise self._wrong({kind: inner})

    def _torch_constant(self, name: Any, cls: type) -> Any:
        constant = getattr(torch, name, None) if isinstance(name, str) else None
        if not isinstance(constant, cls):
            raise GhostifyError(f"{self.where}: torch.{name}: is not a {cls.__name__}")
        return constant

    def _device(self, name: str) -> torch.device:
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise GhostifyError(f"{self.where}: {name!r} is not a device") from error

    def _wrong(self, value: Any) -> GhostifyError:
        return GhostifyError(f"{self.where}: {str(value)[:60]!r} is not a value of a saved model")


def is_identifier(name: object) -> bool:
    """Whether a name can stand in generated source for a variable, a parameter or a keyword."""
    if not isinstance(name, str) or keyword.iskeyword(name):
        return False
    return name.isidentifier() and unicodedata.normalize("NFKC", name) == name
