"""The tensors that a module in JSON data needs: their names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghostify.errors import GhostifyError
from ghostify.graph.paths import join_path
from ghostify.modules.ghost import is_channels_last


@dataclass(frozen=True)
class TensorNeed:
    """What a tensor must be; None for a shape and dtype that data of an earlier version does not state."""

    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    requires_grad: bool = False
    channels_last: bool = False

    def problem(self, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        """Why a tensor of this shape and dtype is not what is needed, or None where it is."""
        if self.shape not in (None, shape):
            return f"has shape {list(shape)}, not {list(self.shape or ())}"
        if self.dtype not in (None, dtype_name(dtype)):
            return f"has dtype {dtype_name(dtype)}, not {self.dtype}"
        if self.requires_grad and not (dtype.is_floating_point or dtype.is_complex):
            return f"has dtype {dtype_name(dtype)}, which cannot have gradients"
        if self.channels_last and len(shape) != 4:
            return f"has {len(shape)} dimensions, which cannot be in channels-last format"
        return None


def tensor_facts(tensor: Tensor) -> dict[str, Any]:
    """The JSON data of a parameter or buffer, which `needed_tensors` reads."""
    return {
        "requires_grad": tensor.requires_grad,
        "channels_last": is_channels_last(tensor),
        "shape": list(tensor.shape),
        "dtype": dtype_name(tensor.dtype),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in JSON data, such as float32."""
    return str(dtype).removeprefix("torch.")


def needed_tensors(data: Mapping[str, Any]) -> dict[str, TensorNeed]:
    """The tensors that a module's JSON data (see `serialize_module`) refers to, by their names in the file.

    Raises `GhostifyError` naming a tensor whose data makes no sense; `KeyError`, `TypeError` or `AttributeError` for
    data that is incomplete.
    """
    needs: dict[str, TensorNeed] = {}
    for path, item in data["modules"].items():
        if "same" in item:
            continue
        for name, facts in (*item["parameters"].items(), *item["buffers"].items()):
            if facts is not None:
                needs[join_path(path, name)] = _need(join_path(path, name), facts)
        for value in item.get("attributes", {}).values():
            needs |= dict.fromkeys(_attribute_tensors(value), TensorNeed())
    return {name: need for name, need in needs.items() if name not in data["aliases"]}


def _need(name: str, facts: Any) -> TensorNeed:
    match facts:
        case {"requires_grad": bool(requires_grad), "channels_last": bool(channels_last)}:
            shape, dtype = facts.get("shape"), facts.get("dtype")
            is_shape = shape is None or (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape))
            if is_shape and (dtype is None or isinstance(dtype, str)):
                return TensorNeed(None if shape is None else tuple(shape), dtype, requires_grad, channels_last)
    raise GhostifyError(f"tensor {name!r}: is not described by its shape, dtype, requires_grad and channels_last")


def _attribute_tensors(value: Any) -> Iterator[str]:
    """The names of the tensors in a plain attribute."""
    match value:
        case {"tensor": str(name)}:
            yield name
        case {"object": [_, {**attributes}]}:
            for inner in attributes.values():
                yield from _attribute_tensors(inner)
        case [*items]:
            for inner in items:
                yield from _attribute_tensors(inner)
        case {**kinds}:
            for inner in kinds.values():
                yield from _attribute_tensors(inner)
