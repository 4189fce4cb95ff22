"""The names that a saved model may use: an exact list of functions, methods and classes, and what the user allows."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.resources import files
from typing import Any

from torch import nn

from ghostify.errors import GhostifyError
from ghostify.graph.ops import METADATA, OPS
from ghostify.imports import import_name, import_object

NAMES_FILE = "allowed_names.txt"
DEVICE = re.compile(r"(cpu|cuda|meta|mps|xpu)(:\d{1,3})?")
DOTTED = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
NAME, ENTRY = re.compile(f"{DOTTED}:{DOTTED}"), re.compile(f"{DOTTED}(:{DOTTED})?")
TENSOR_TYPE = re.compile(r"torch\.(cuda\.)?[A-Z]\w{2,12}Tensor")
READABLE_ATTRIBUTES = frozenset({
    *METADATA, "T", "mT", "H", "mH", "real", "imag", "data", "itemsize", "nbytes", "is_cpu", "is_leaf", "is_meta",
    "is_mps", "is_nested", "is_quantized", "is_sparse", "is_xpu",
})  # fmt: skip

CLASS_ATTRIBUTES = frozenset({"_norm_layer", "act_layer", "norm_layer", "stage_block_types"})
"""Attributes of listed classes that may hold a module class: their forwards do not create modules from them."""

DEVICE_TYPES = frozenset({"cpu", "cuda", "xpu", "ipu", "mtia"})
"""Keys of caches by device. They are also methods that move a module, and nothing else."""

CALLERS = {
    "builtins:max": "key",
    "builtins:min": "key",
    "torch.nn.functional:triplet_margin_with_distance_loss": "distance_function",
}
"""Functions that call an argument, with its keyword: a graph may not pass it."""

ANY_TEXT = frozenset({
    "torch:_assert", "torch.functional:einsum", "_operator:getitem", "_operator:contains", "_operator:eq",
    "_operator:ne", "ghostify.graph.symbolic_tracer:check_default_argument",
    "ghostify.graph.symbolic_tracer:check_no_extra_arguments", "ghostify.graph.symbolic_tracer:check_training_mode",
})  # fmt: skip
"""Functions whose texts are messages, keys or equations."""

TEXTS = frozenset({
    "", "area", "avg", "backward", "batchmean", "bicubic", "bilinear", "border", "circular", "constant",
    "euclidean", "first", "floor", "forward", "fro", "ij", "left", "linear", "mean", "nearest",
    "nearest-exact", "none", "nuc", "ortho", "prod", "reduced", "reflect", "reflection", "replicate", "right", "same",
    "sum", "tanh", "token", "trilinear", "trunc", "valid", "xy", "zeros", "amax", "amin", "max", "min",
    "lower", "higher", "midpoint", "map", "complete",
})  # fmt: skip
"""Modes and reductions: the texts that other functions, methods and modules may take."""


@dataclass(frozen=True)
class ListedNames:
    """Import names "module:qualified name" by kind, and names of methods."""

    modules: frozenset[str]
    functions: frozenset[str]
    objects: frozenset[str]
    methods: frozenset[str]


def names_in_file() -> ListedNames:
    """The names in `allowed_names.txt`."""
    sections: dict[str, set[str]] = {"modules": set(), "functions": set(), "objects": set(), "methods": set()}
    section = ""
    for line in files("ghostify.graph").joinpath(NAMES_FILE).read_text("utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            module, separator, names = line.rpartition(": ")
            sections[section].update(f"{module}:{name}" if separator else name for name in names.split())
    return ListedNames(**{kind: frozenset(names) for kind, names in sections.items()})


def names_in_table() -> ListedNames:
    """The names in the operator table."""
    return ListedNames(
        modules=frozenset(import_name(module) for op in OPS for module in op.modules),
        functions=frozenset(import_name(function) for op in OPS for function in op.functions),
        objects=frozenset(),
        methods=frozenset(method for op in OPS for method in op.methods),
    )


@cache
def listed_names() -> ListedNames:
    """The names in the file and in the operator table."""
    file, table = names_in_file(), names_in_table()
    return ListedNames(
        file.modules | table.modules, file.functions | table.functions, file.objects, file.methods | table.methods
    )


class AllowedNames:
    """The classes and functions that a saved model may name: those listed, and those that the user allows.

    An entry "package.module:Name" of `allow` is one class or function, "package.module" stands for those that this
    module defines. Nothing is imported from any other. Raises `GhostifyError` for an entry of another form.
    """

    def __init__(self, allow: Iterable[str] = ()) -> None:
        entries = [allow] if isinstance(allow, str) else list(allow)
        for entry in entries:
            if not isinstance(entry, str) or not ENTRY.fullmatch(entry):
                raise GhostifyError(
                    f"allow={entry!r}: is not a name. Write package.module:Name, or package.module for all that it "
                    f"defines."
                )
        self._allowed = frozenset(entries)

    def is_listed(self, name: str) -> bool:
        """Whether the name needs no permission."""
        listed = listed_names()
        return name in listed.modules or name in listed.functions or name in listed.objects

    def is_allowed(self, name: str) -> bool:
        """Whether the name is listed, or the user allows it."""
        return self.is_listed(name) or self.is_custom(name)

    def is_custom(self, name: str) -> bool:
        """Whether only the user's permission allows the name."""
        return not self.is_listed(name) and not self._allowed.isdisjoint((name, name.partition(":")[0]))

    def check(self, names: Iterable[str]) -> None:
        """Raise `GhostifyError` for names that are not allowed, with the entries that would allow them."""
        names = dict.fromkeys(names)
        if malformed := next((name for name in names if not NAME.fullmatch(name)), None):
            raise GhostifyError(f"{malformed[:80]!r}: is not the name of a class or function")
        refused = [name for name in names if not self.is_allowed(name)]
        if refused:
            more = f" and {len(refused) - 1} more names" if len(refused) > 1 else ""
            python, command = allow_entries(refused)
            raise GhostifyError(
                f"{refused[0]}{more}: not in the list of what a saved model may name. If you trust who saved it, use "
                f"load(..., {python}), or {command}."
            )

    def module_class(self, name: str) -> type[nn.Module]:
        """A subclass of `nn.Module`."""
        cls = self._load(name, listed_names().modules)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise GhostifyError(f"{name}: is not a subclass of nn.Module")
        return cls

    def plain_class(self, name: str) -> type:
        """A class that is not a module's, of which an instance may be created."""
        cls = self._load(name, listed_names().objects)
        if not isinstance(cls, type) or issubclass(cls, nn.Module | Enum):
            raise GhostifyError(f"{name}: is not a plain class")
        return cls

    def enum_member(self, name: str, member: object) -> Enum:
        """The member of an enumeration."""
        cls = self._load(name, listed_names().objects)
        if not (isinstance(cls, type) and issubclass(cls, Enum)) or member not in cls.__members__:
            raise GhostifyError(f"{name}: is not an enumeration with a member {member!r}")
        return cls.__members__[str(member)]

    def function(self, name: str) -> Callable[..., Any]:
        """A function, or a class that the user allows, that a graph may call."""
        return self._callable(name, listed_names().functions)

    def value(self, name: str, *, may_be_class: bool) -> Callable[..., Any]:
        """A function, or also a class, that may be the value of an attribute: not one that reads any attribute."""
        listed = listed_names()
        classes = listed.modules | listed.objects if may_be_class else frozenset()
        return self._callable(name, (listed.functions | classes) - {"builtins:getattr"})

    def _callable(self, name: str, listed: frozenset[str]) -> Callable[..., Any]:
        loaded = self._load(name, listed)
        if not callable(loaded):
            raise GhostifyError(f"{name}: is not a function or class")
        function: Callable[..., Any] = loaded
        return function

    def _load(self, name: str, listed: frozenset[str]) -> Any:
        self.check([name])
        if name not in listed and not self.is_custom(name):
            raise GhostifyError(f"{name}: is not allowed here in a saved model")
        try:
            return _custom_object(name, name in self._allowed) if self.is_custom(name) else import_object(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise GhostifyError(f"{name}: is not installed ({error}). Install it.") from error


def allow_entries(names: Iterable[str]) -> tuple[str, str]:
    """What allows these names: as an argument of `load`, and as options of the command.

    One name is allowed by itself, several by the modules that define them.
    """
    names = list(dict.fromkeys(names))
    entries = names if len(names) == 1 else sorted({name.partition(":")[0] for name in names})
    return f"allow={entries}", " ".join(f"--allow {entry}" for entry in entries)


def is_mode_text(text: str) -> bool:
    """Whether a text is a mode, a reduction, a device or a type of tensors."""
    return text in TEXTS or any(pattern.fullmatch(text) for pattern in (DEVICE, TENSOR_TYPE))


def check_method_name(name: str) -> None:
    """Raise `GhostifyError` for a method that a graph may not call."""
    if name not in listed_names().methods:
        raise GhostifyError(f"method {name!r}: is not allowed in a saved model")


def _custom_object(name: str, is_exact: bool) -> Any:
    """A class or function that the user allows: never a module, nor what lies within another module.

    What the module only imports counts where the entry names it by itself.
    """
    module, _, qualified_name = name.partition(":")
    current: Any = importlib.import_module(module)
    *owners, last = qualified_name.split(".")
    for owner in owners:
        current = getattr(current, owner)
        if not isinstance(current, type):
            raise GhostifyError(f"{name}: {owner} is not a class")
    value = getattr(current, last)
    if not is_exact and getattr(value, "__module__", None) != module:
        raise GhostifyError(f"{name}: {module} does not define it. Allow the module that does.")
    return value
