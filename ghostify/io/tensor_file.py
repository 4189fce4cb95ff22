"""The tensors of a safetensors file, whose header is checked before anything is allocated."""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ghostify.errors import GhostifyError
from ghostify.files import MEGABYTE, open_regular, parse_json
from ghostify.graph.tensor_facts import TensorFacts

FILE_LIMIT, HEADER_LIMIT = 32 * 1024 * MEGABYTE, 32 * MEGABYTE  # bytes
RANK_LIMIT, ELEMENT_LIMIT = 32, 2**40
LENGTH_BYTES = 8  # of the header's length, at the start of the file
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """The dtype, shape and place of a tensor in a file, in bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def read_tensors(
    file: Path,
    *,
    digest: str | None = None,
    needed: Mapping[str, TensorFacts] | None = None,
    description: str = "description",
    remedy: str = "Save it again.",
) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU; they share the file's memory, copied where written to.

    Raises `GhostifyError` naming the file: for any other than a regular file within its folder, for a header that does
    not describe exactly the bytes of the file or has other tensors than `needed`, and for another SHA-256 than
    `digest`. All of it is checked on the same open file before a tensor is made.
    """
    with open_regular(file, limit=FILE_LIMIT, folder=file.parent, remedy=remedy) as stream:
        try:
            header = _read_header(stream)
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise GhostifyError(f"{file}: is damaged or not a safetensors file ({error}). {remedy}") from error
    if needed is not None:
        mismatch = next(_mismatches(header, needed), None)
        if mismatch is not None:
            raise GhostifyError(f"{file}: does not fit {description}: {mismatch}. {remedy}")
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise GhostifyError(f"{file}: is damaged or belongs to another {description}. {remedy}")
    return {name: _tensor(content, stored) for name, stored in header.items()}


def _mismatches(header: Mapping[str, StoredTensor], needed: Mapping[str, TensorFacts]) -> Iterator[str]:
    for name in sorted(header.keys() ^ needed.keys()):
        yield f"tensor {name!r} is {'missing' if name in needed else 'not part of the model'}"
    for name, stored in header.items():
        problem = needed[name].problem(stored.shape, stored.dtype)
        if problem is not None:
            yield f"tensor {name!r} {problem}"


def _tensor(content: mmap.mmap, stored: StoredTensor) -> Tensor:
    if stored.offset == stored.end:
        return torch.empty(stored.shape, dtype=stored.dtype)
    count = math.prod(stored.shape)
    return torch.frombuffer(content, dtype=stored.dtype, count=count, offset=stored.offset).reshape(stored.shape)


def _read_header(stream: BinaryIO) -> dict[str, StoredTensor]:
    """The tensors of an open file by name; raises `ValueError` where they do not fill exactly the rest of the file."""
    size = stream.seek(0, 2)
    stream.seek(0)
    length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
    start = LENGTH_BYTES + length
    if length > HEADER_LIMIT or start > size:
        raise ValueError(f"a header of {length} bytes")
    entries = parse_json(stream.read(length).decode())
    if not isinstance(entries, dict):
        raise ValueError("its header is no object")
    entries.pop("__metadata__", None)
    header = {name: _entry(name, entry, start) for name, entry in entries.items()}
    end = start
    for name, stored in sorted(header.items(), key=lambda item: (item[1].offset, item[1].end)):
        if stored.offset != end:
            raise ValueError(f"tensor {name!r} is not where the one before it ends")
        end = stored.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end} of {size}")
    return header


def _entry(name: str, entry: Any, start: int) -> StoredTensor:
    """A tensor of the header, whose offsets count from `start`."""
    match entry:
        case {"dtype": str(dtype), "shape": [*sizes], "data_offsets": [int(first), int(last)]} if dtype in DTYPES:
            is_valid = all(type(n) is int and n >= 0 for n in (first, last, *sizes)) and len(sizes) <= RANK_LIMIT
            if is_valid and math.prod(max(1, n) for n in sizes) < ELEMENT_LIMIT:
                stored = StoredTensor(DTYPES[dtype], tuple(sizes), start + first)
                if stored.end == start + last:
                    return stored
    raise ValueError(f"tensor {name!r} has no dtype, shape and offsets that fit each other")
