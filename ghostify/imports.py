"""Import of objects by name."""

from __future__ import annotations

import importlib
import types
from functools import reduce
from typing import Any

import torch


def import_object(name: str) -> Any:
    """The object named "module:attribute", where the attribute may be dotted; raises what the import raises."""
    module, _, attribute = name.partition(":")
    return reduce(getattr, attribute.split("."), importlib.import_module(module))


def import_name(value: Any) -> str:
    """The name "module:qualified name" of a class or function; `import_object` may find nothing, or another, by it."""
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
    return f"{module}:{name}"


def is_importable(value: Any) -> bool:
    """Whether `import_object` finds the value by its `import_name`."""
    try:
        return import_object(import_name(value)) is value
    except (ImportError, AttributeError, ValueError):
        return False
