"""Storage for activations: in separate memory up to a limit, in temporary files beyond it."""

from __future__ import annotations

import bisect
import ctypes
import os
import sys
import tempfile
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghostify.errors import GhostifyError

ALIGNMENT_BYTES = 64


class FileTensor:
    """A dense tensor in a temporary file, loaded bit-equal with its strides; the file is removed with this object."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        self.like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self.path = ""
        try:
            descriptor, self.path = tempfile.mkstemp(prefix="ghostify-")
            with open(descriptor, "wb") as file:
                file.write(_bytes(tensor.cpu()))
        except OSError as error:
            raise GhostifyError(
                f"{tempfile.gettempdir()}: writing the activations of the calibration failed ({error.strerror}). "
                f"Free some space, set TMPDIR to another folder, or calibrate on fewer images."
            ) from error

    def load(self) -> Tensor:
        """The tensor, in newly allocated memory."""
        tensor = torch.empty_strided(self.like.shape, self.like.stride(), dtype=self.like.dtype)
        with open(self.path, "rb") as file:
            file.readinto(_bytes(tensor))
        return tensor.to(self.device)

    def __del__(self) -> None:
        if os.path.exists(self.path):
            os.unlink(self.path)


class HostTensor:
    """A tensor of another device, stored in this machine's memory."""

    def __init__(self, stored: Tensor, device: torch.device) -> None:
        self.stored, self.device = stored, device

    def load(self) -> Tensor:
        """The tensor on its original device."""
        return self.stored.to(self.device)


def restore(value: Any) -> Any:
    """A stored value, back in memory and on its device; any other value unchanged."""
    return value.load() if isinstance(value, FileTensor | HostTensor) else value


class ActivationStore:
    """Stores values in `limit` bytes of separate memory, and beyond them in temporary files.

    The memory is separate because long-lived values fragment the heap, which then grows with the number of values.
    """

    def __init__(self, limit: int) -> None:
        self.memory: NDArray[np.uint8] = torch.empty(limit, dtype=torch.uint8).numpy()
        self.free_ranges = [(0, limit)]

    def put(self, value: Any, *, movable: bool = True) -> Any:
        """A stored copy, bit-equal and with the same strides, or the value itself.

        Only plain dense tensors are moved, and only once. A value in a file, or of another device, is returned as an
        object to `load`.
        """
        if not movable or not _is_storable(value) or self._contains(value):
            return value
        memory = self._allocate(value.numel() * value.element_size())
        if memory is None:
            return FileTensor(value)
        stored = torch.frombuffer(memory, dtype=value.dtype).as_strided(value.shape, value.stride()).copy_(value)
        return stored if value.device.type == "cpu" else HostTensor(stored, value.device)

    def _contains(self, tensor: Tensor) -> bool:
        offset = tensor.data_ptr() - self.memory.ctypes.data
        return tensor.device.type == "cpu" and 0 <= offset < len(self.memory)

    def _allocate(self, size: int) -> NDArray[np.uint8] | None:
        """The start of the first free range that is large enough, or None; it is freed when nothing refers to it.

        Tensors created from it refer to it, and so do their views.
        """
        size = -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        for k, (start, end) in enumerate(self.free_ranges):
            if end - start >= size:
                self.free_ranges[k : k + 1] = [(start + size, end)] if end - start > size else []
                memory = self.memory[start : start + size]
                weakref.finalize(memory, self._free, start, start + size)
                return memory
        return None

    def _free(self, start: int, end: int) -> None:
        k = bisect.bisect(self.free_ranges, (start, end))
        if k < len(self.free_ranges) and self.free_ranges[k][0] == end:
            end = self.free_ranges.pop(k)[1]
        if k and self.free_ranges[k - 1][1] == start:
            start = self.free_ranges.pop(k - 1)[0]
            k -= 1
        self.free_ranges.insert(k, (start, end))


def _is_storable(value: Any) -> bool:
    return type(value) is Tensor and value.layout is torch.strided and _is_dense(value) and not value.requires_grad


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order."""
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


def trim_heap() -> None:
    """Return the heap's free pages to the system, where the C library can; small live objects retain them otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
