"""Dotted paths of modules and tensors, relative to the whole model, whose own path is empty."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn


def join_path(path: str, name: str) -> str:
    """The path of what is called `name` in the module at `path`."""
    return f"{path}.{name}" if path else name


def resolve_attribute(module: nn.Module, path: str) -> Any:
    """The parameter, buffer or other attribute at a dotted path."""
    return operator.attrgetter(path)(module)


def called_module(module: nn.Module, node: fx.Node) -> nn.Module:
    """The submodule that a `call_module` node calls."""
    return module.get_submodule(str(node.target))
