"""What a forward may change in its modules: attributes, hooks, submodules and the contents of buffers."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (dict, OrderedDict, list, set, deque)
MODULE_INTERNALS = frozenset(nn.Module().__dict__)
_MISSING = object()


class ModuleState:
    """The attributes of all modules of a model, and the contents of its buffers, at one moment.

    Attributes are kept as they are, containers and tensors that are not parameters with their contents.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(path, module, dict(vars(module))) for path, module in model.named_modules()]
        self._containers = {
            id(value): (value, value.copy())
            for _, _, attributes in self._attributes
            for value in attributes.values()
            if type(value) in CONTAINERS
        }
        self._tensors = {
            id(value): (value, value.detach().clone())
            for _, module, attributes in self._attributes
            for value in (*module._buffers.values(), *attributes.values())
            if _has_contents(value)
        }

    def restore(self) -> None:
        """Set all attributes and contents back."""
        for _, module, attributes in self._attributes:
            present = vars(module)
            for name in present.keys() - attributes.keys():
                del present[name]
            present.update(attributes)
        for value, content in self._containers.values():
            value.clear()
            if isinstance(value, dict | set):
                value.update(content)
            else:
                value.extend(content)
        for value, content in self._tensors.values():
            if value.shape != content.shape:
                value.data = content.clone()
            elif not torch.equal(value, content):
                with torch.no_grad():
                    value.copy_(content)

    def changed_buffer(self) -> tuple[str, str] | None:
        """The module path and name of a buffer with other contents, or that was replaced."""
        for path, module, attributes in self._attributes:
            former = self._containers.get(id(attributes.get("_buffers")), ({}, {}))[1]
            for name, buffer in module._buffers.items():
                if buffer is not former.get(name) or (id(buffer) in self._tensors and self._has_changed(buffer)):
                    return path, name
        return None

    def changed_attributes(self) -> Iterator[tuple[str, nn.Module, str, Any]]:
        """The module path, module, name and value of every attribute that has another value or is new."""
        for path, module, attributes in self._attributes:
            for name, value in vars(module).items():
                former = attributes.get(name, _MISSING)
                if name not in MODULE_INTERNALS and value is not former and not _is_same_number(value, former):
                    yield path, module, name, value

    def _has_changed(self, tensor: Tensor) -> bool:
        return not _equal(*self._tensors[id(tensor)])


def _has_contents(value: Any) -> bool:
    """Whether a value is a tensor, other than a parameter, whose contents can be copied and compared."""
    return (
        isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and value.layout is torch.strided
        and not (value.is_meta or value.is_quantized or value.is_inference())
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _is_same_number(a: object, b: object) -> bool:
    return type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b
