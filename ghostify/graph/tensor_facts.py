"""What the description of a saved module says of a tensor: its shape, dtype and flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghostify.errors import GhostifyError
from ghostify.modules.ghost import is_channels_last

CONV_DIMS = 4


@dataclass(frozen=True)
class TensorFacts:
    """What a parameter or buffer must be; `shape` and `dtype` are None where an earlier version did not write them."""

    requires_grad: bool = False
    channels_last: bool = False
    persistent: bool = True
    shape: tuple[int, ...] | None = None
    dtype: str | None = None

    def problem(self, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        """Why a tensor of this shape and dtype is not the one described, or None where it is."""
        if self.shape not in (None, shape):
            return f"has shape {list(shape)}, not {list(self.shape or ())}"
        if self.dtype not in (None, dtype_name(dtype)):
            return f"has dtype {dtype_name(dtype)}, not {self.dtype}"
        if self.requires_grad and not (dtype.is_floating_point or dtype.is_complex):
            return f"has dtype {dtype_name(dtype)}, which takes no gradient"
        if self.channels_last and len(shape) != CONV_DIMS:
            return f"has {len(shape)} dimensions, which have no order of channels"
        return None


def facts_of(tensor: Tensor) -> dict[str, Any]:
    """The facts of a parameter or buffer as JSON data."""
    return {
        "requires_grad": tensor.requires_grad,
        "channels_last": is_channels_last(tensor),
        "shape": list(tensor.shape),
        "dtype": dtype_name(tensor.dtype),
    }


def parse_facts(facts: Mapping[str, Any], where: str) -> TensorFacts:
    """The facts in JSON data; raises `GhostifyError` for other data."""
    shape, dtype, *flags = (facts.get(key) for key in ("shape", "dtype", "requires_grad", "channels_last"))
    flags.append(facts.get("persistent", True))
    is_shape = shape is None or (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape))
    is_known = facts.keys() <= TensorFacts.__annotations__.keys() and is_shape and isinstance(dtype, str | None)
    if not is_known or not all(isinstance(flag, bool) for flag in flags):
        raise GhostifyError(f"{where} is not described by its shape, dtype and flags")
    requires_grad, channels_last, persistent = map(bool, flags)
    return TensorFacts(requires_grad, channels_last, persistent, None if shape is None else tuple(shape), dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in JSON data, such as float32."""
    return str(dtype).removeprefix("torch.")
