"""Values that outlive a step, in memory up to a limit and in temporary files beyond it."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ghostify.errors import GhostifyError


class Stored:
    """A dense tensor in a temporary file, read back bit-equal with its strides; the file goes with this object."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        self.like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self.path = ""
        try:
            number, self.path = tempfile.mkstemp(prefix="ghostify-")
            with open(number, "wb") as file:
                file.write(_bytes(tensor.cpu()))
        except OSError as error:
            raise GhostifyError(
                f"{tempfile.gettempdir()}: no room for the calibration's activations ({error.strerror}): make some, "
                f"set TMPDIR to another folder, or calibrate on fewer images"
            ) from error

    def load(self) -> Tensor:
        """The tensor, in memory of its own."""
        tensor = torch.empty_strided(self.like.shape, self.like.stride(), dtype=self.like.dtype)
        with open(self.path, "rb") as file:
            file.readinto(_bytes(tensor))
        return tensor.to(self.device)

    def __del__(self) -> None:
        if os.path.exists(self.path):
            os.unlink(self.path)


class Shelf:
    """Takes values up; `limit` bytes of them stay in memory, the rest goes to temporary files."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    def put(self, value: Any, *, movable: bool = True) -> Any:
        """The value itself while there is room, else a `Stored` of it. Only plain dense tensors move."""
        if self.held + _size(value) > self.limit and movable and _plain(value):
            return Stored(value)
        self.held += _size(value)
        return value

    def give_back(self, value: Any) -> None:
        """Give the caller back what `put` returned, and its room to others."""
        self.held -= _size(value)


def _size(value: Any) -> int:
    """Bytes of all tensors in a value; none for what lies in a file."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, Tensor))


def _plain(value: Any) -> bool:
    return type(value) is Tensor and value.layout is torch.strided and _dense(value) and not value.requires_grad


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted((t, s) for s, t in zip(tensor.shape, tensor.stride(), strict=True) if s > 1):
        if stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a dense tensor on the CPU."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return flat.numpy().data
