"""Storage for activations: in separate memory up to a limit, in temporary files beyond it."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import sys
import tempfile
import weakref
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghostify.errors import GhostifyError

ALIGNMENT_BYTES = 64


class FreeRanges:
    """The free ranges of a memory or file of `size` bytes, in order and never adjacent."""

    def __init__(self, size: int) -> None:
        self.ranges = [(0, size)]

    def allocate(self, size: int) -> int | None:
        """The start of the first free range that is large enough, or None."""
        size = _aligned(size)
        for k, (start, end) in enumerate(self.ranges):
            if end - start >= size:
                self.ranges[k : k + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def free(self, start: int, size: int) -> None:
        """Return an allocated range."""
        end = start + _aligned(size)
        k = bisect.bisect(self.ranges, (start, end))
        if k < len(self.ranges) and self.ranges[k][0] == end:
            end = self.ranges.pop(k)[1]
        if k and self.ranges[k - 1][1] == start:
            start = self.ranges.pop(k - 1)[0]
            k -= 1
        self.ranges.insert(k, (start, end))


class SpillFile:
    """One temporary file for many tensors; without a name, so that it is gone when the process ends in any way."""

    def __init__(self) -> None:
        self.file: IO[bytes] | None = None
        self.free_ranges = FreeRanges(sys.maxsize)

    def write(self, data: memoryview) -> int:
        """Write into the first free range that is large enough; returns its start. Raises `OSError`."""
        if self.file is None:
            self.file = tempfile.TemporaryFile(prefix="ghostify-", buffering=0)  # noqa: SIM115 - closed with this object
            weakref.finalize(self, self.file.close)
        size, start = len(data), self.free_ranges.allocate(len(data))
        assert start is not None
        try:
            self.file.seek(start)
            while data:
                data = data[self.file.write(data) :]
        except OSError:
            self.free(start, size)
            raise
        return start

    def read(self, start: int, memory: memoryview) -> None:
        """Fill `memory` with what was written from `start` on."""
        assert self.file is not None
        self.file.seek(start)
        while memory:
            count = self.file.readinto(memory)  # type: ignore[attr-defined]
            assert count
            memory = memory[count:]

    def free(self, start: int, size: int) -> None:
        """Free a range; the file ends where its last range ends."""
        self.free_ranges.free(start, size)
        if self.file is not None and not self.file.closed:
            with contextlib.suppress(OSError):  # the space is used again in any case
                self.file.truncate(self.free_ranges.ranges[-1][0])


class FileTensor:
    """A dense tensor in a temporary file, loaded bit-equal with its strides; its range is free without this object."""

    def __init__(self, tensor: Tensor, file: SpillFile) -> None:
        self.device, self.file = tensor.device, file
        self.like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        data = _bytes(tensor.cpu())
        try:
            self.start = file.write(data)
        except OSError as error:
            raise GhostifyError(
                f"{tempfile.gettempdir()}: writing the activations of the calibration failed ({error.strerror}). "
                f"Free some space, set TMPDIR to another folder, or calibrate on fewer images."
            ) from error
        weakref.finalize(self, file.free, self.start, len(data))

    def load(self) -> Tensor:
        """The tensor, in newly allocated memory."""
        tensor = torch.empty_strided(self.like.shape, self.like.stride(), dtype=self.like.dtype)
        self.file.read(self.start, _bytes(tensor))
        return tensor.to(self.device)


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
        self.free_ranges, self.file = FreeRanges(limit), SpillFile()

    def put(self, value: Any, *, movable: bool = True) -> Any:
        """A stored copy, bit-equal and with the same strides, or the value itself.

        Only plain dense tensors are moved, and only once. A value in a file, or of another device, is returned as an
        object to `load`.
        """
        if not movable or not _is_storable(value) or self._contains(value):
            return value
        memory = self._allocate(value.numel() * value.element_size())
        if memory is None:
            return FileTensor(value, self.file)
        stored = torch.frombuffer(memory, dtype=value.dtype).as_strided(value.shape, value.stride()).copy_(value)
        return stored if value.device.type == "cpu" else HostTensor(stored, value.device)

    def _contains(self, tensor: Tensor) -> bool:
        offset = tensor.data_ptr() - self.memory.ctypes.data
        return tensor.device.type == "cpu" and 0 <= offset < len(self.memory)

    def _allocate(self, size: int) -> NDArray[np.uint8] | None:
        """A range of the memory, or None; it is freed when nothing refers to it.

        Tensors created from it refer to it, and so do their views.
        """
        start = self.free_ranges.allocate(size)
        if start is None:
            return None
        memory = self.memory[start : start + _aligned(size)]
        weakref.finalize(memory, self.free_ranges.free, start, size)
        return memory


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


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
