"""Values that outlive a step, in memory of their own up to a limit and in temporary files beyond it."""

from __future__ import annotations

import bisect
import ctypes
import os
import sys
import tempfile
import weakref
from typing import Any

import torch
from torch import Tensor

from ghostify.errors import GhostifyError

ALIGNED = 64


class FileTensor:
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


class HostTensor:
    """A tensor of another device, put aside in this machine's memory."""

    def __init__(self, kept: Tensor, device: torch.device) -> None:
        self.kept, self.device = kept, device

    def load(self) -> Tensor:
        """The tensor on its own device."""
        return self.kept.to(self.device)


def restore(value: Any) -> Any:
    """The value that was put aside, back in memory and on its device; any other as it is."""
    return value.load() if isinstance(value, FileTensor | HostTensor) else value


class ActivationStore:
    """Takes values up: into `limit` bytes of memory of its own, and beyond them into temporary files.

    Memory apart, because values that outlive the others riddle the heap with holes, which then grows with their number.
    """

    def __init__(self, limit: int) -> None:
        self.memory = torch.empty(limit, dtype=torch.uint8).numpy()
        self.free_ranges = [(0, limit)]

    def put(self, value: Any, *, movable: bool = True) -> Any:
        """A copy on the shelf, its values bit-equal and its strides the same, or the value itself. Only plain dense
        tensors move, and only once; what lies in a file, or is from another device, comes as a thing to `load`."""
        if not movable or not _plain(value) or self._holds(value):
            return value
        room = self._take(value.numel() * value.element_size())
        if room is None:
            return FileTensor(value)
        kept = torch.frombuffer(room, dtype=value.dtype).as_strided(value.shape, value.stride()).copy_(value)
        return kept if value.device.type == "cpu" else HostTensor(kept, value.device)

    def _holds(self, tensor: Tensor) -> bool:
        offset = tensor.data_ptr() - self.memory.ctypes.data
        return tensor.device.type == "cpu" and 0 <= offset < len(self.memory)

    def _take(self, size: int) -> Any:
        """The beginning of the first hole that is large enough, if any; when nobody holds it, it is a hole again.

        Tensors made of it hold it, and so do their views.
        """
        size = -(-size // ALIGNED) * ALIGNED
        for k, (start, end) in enumerate(self.free_ranges):
            if end - start >= size:
                self.free_ranges[k : k + 1] = [(start + size, end)] if end - start > size else []
                room = self.memory[start : start + size]
                weakref.finalize(room, self._give_back, start, start + size)
                return room
        return None

    def _give_back(self, start: int, end: int) -> None:
        k = bisect.bisect(self.free_ranges, (start, end))
        if k < len(self.free_ranges) and self.free_ranges[k][0] == end:
            end = self.free_ranges.pop(k)[1]
        if k and self.free_ranges[k - 1][1] == start:
            start = self.free_ranges.pop(k - 1)[0]
            k -= 1
        self.free_ranges.insert(k, (start, end))


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


def trim_heap() -> None:
    """Give the heap's free pages back to the system, where the C library can: small things that stay hold them else."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
