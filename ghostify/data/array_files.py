"""Arrays in files as inputs, with labels where there are any."""

from __future__ import annotations

import lzma
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ghostify.errors import GhostifyError
from ghostify.files import open_regular
from ghostify.io.tensor_file import read_tensors
from ghostify.text import format_shape

IMAGES, LABELS = "images", "labels"
REMEDY = "Name a file of arrays without Python objects."
REAL_KINDS, MAX_LABEL = "fiub", 2**31 - 1
UNREADABLE = (
    OSError, ValueError, EOFError, KeyError, TypeError, OverflowError, MemoryError, NotImplementedError, RuntimeError,
    SyntaxError, tokenize.TokenError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
)  # fmt: skip

Array = npt.NDArray[np.generic]


def read_arrays(
    path: Path, size: tuple[int, int, int], select: Callable[[int], Sequence[int]]
) -> tuple[Tensor, Tensor | None]:
    """Inputs (N x C x H x W, float32) of an array file, and labels (N); of both those that `select` picks of N.

    The channels are those of `size` (C, H, W), the other sizes may differ.
    Real numbers of any type are inputs as they are: they are neither scaled nor normalized. Raises `GhostifyError`
    for a file that cannot be read, whose header states more than the file holds, for other values than finite
    real numbers, and for labels that are not one class number, or one row with a single 1, for each image.
    """
    arrays = _load(path)
    images = arrays.get(IMAGES, next(iter(arrays.values())) if len(arrays) == 1 else None)
    if images is None:
        raise GhostifyError(
            f"{path}: holds {', '.join(arrays) or 'no array'}, not images. Store the inputs under the name 'images'."
        )
    if images.dtype.kind not in REAL_KINDS:
        raise GhostifyError(f"{path}: holds values of type {images.dtype}. Store real numbers.")
    if images.ndim != 4 or images.shape[1] != size[0] or not images.size:
        shape, expected = format_shape(images.shape) or "a single value", format_shape(("N", *size))
        raise GhostifyError(f"{path}: holds {shape}, the model expects {expected}. Save the images in this shape.")
    indices = list(select(len(images)))
    with np.errstate(over="ignore"):  # infinite values are refused below
        selected = np.ascontiguousarray(images[indices], dtype=np.float32)
    finite = np.isfinite(selected.reshape(len(selected), -1)).all(1)
    if not finite.all():
        raise GhostifyError(
            f"{path}: image {indices[int(finite.argmin())]} holds values that are not finite. Replace or remove it."
        )
    labels = arrays.get(LABELS)
    return torch.from_numpy(selected), None if labels is None else _class_numbers(labels, len(images), path)[indices]


def _load(path: Path) -> Mapping[str, Array]:
    """The arrays of a file by name."""
    try:
        return READERS[path.suffix.lower()](path)
    except UNREADABLE as error:
        raise GhostifyError(f"{path}: cannot be read ({type(error).__name__}: {error}). {REMEDY}") from error


def _load_npy(path: Path) -> Mapping[str, Array]:
    """The one array, as "images"; it stays on disk until it is indexed."""
    with open_regular(path, remedy=REMEDY) as stream:
        return {IMAGES: _map_array(stream)}


def _load_npz(path: Path) -> Mapping[str, Array]:
    with open_regular(path, remedy=REMEDY) as stream, zipfile.ZipFile(stream) as archive:
        return {name.removesuffix(".npy"): _read_array(archive, name) for name in archive.namelist()}


def _load_safetensors(path: Path) -> Mapping[str, Array]:
    return {name: _as_numpy(tensor) for name, tensor in read_tensors(path, remedy=REMEDY).items()}


READERS: Mapping[str, Callable[[Path], Mapping[str, Array]]] = {
    ".npy": _load_npy,
    ".npz": _load_npz,
    ".safetensors": _load_safetensors,
}
ARRAY_SUFFIXES = tuple(READERS)


def is_array_file(path: Path) -> bool:
    """Whether a path has a suffix of array files."""
    return path.suffix.lower() in ARRAY_SUFFIXES


def _map_array(stream: BinaryIO) -> Array:
    """The array of an open `.npy` file, on disk."""
    shape, is_fortran, dtype = _read_header(stream, os.fstat(stream.fileno()).st_size)
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(stream, dtype, "r", stream.tell(), shape, "F" if is_fortran else "C")


def _read_array(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(name) as stream:
        _read_header(stream, archive.getinfo(name).file_size)
    with archive.open(name) as stream:
        array: Array = np.lib.format.read_array(stream, allow_pickle=False)
        return array


def _read_header(stream: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of an array; raises `ValueError` for Python objects, and where `size` is too small."""
    version = np.lib.format.read_magic(stream)
    read_1, read_2 = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = (read_1 if version == (1, 0) else read_2)(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"its header states {format_shape(shape)} values of {dtype}, the file has {size} bytes")
    return shape, is_fortran, dtype


def _as_numpy(tensor: Tensor) -> Array:
    """A tensor as an array; of types that numpy lacks, such as bfloat16, as float32."""
    return tensor.numpy() if tensor.dtype in _NUMPY_TYPES else tensor.float().numpy()


_NUMPY_TYPES = {
    torch.float16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128,
}  # fmt: skip


def _class_numbers(labels: Array, count: int, path: Path) -> Tensor:
    """Labels as class numbers (N)."""
    values = labels.astype(np.uint8) if labels.dtype == bool else labels
    if values.ndim == 2 and values.shape[1] > 1 and _is_one_hot(values):
        values = values.argmax(1)
    if values.shape not in ((count,), (count, 1)):
        raise GhostifyError(
            f"{path}: holds {count} images and labels of shape {format_shape(values.shape)}. "
            f"Store one class number for each image."
        )
    is_integral = values.dtype.kind in REAL_KINDS and bool((np.isfinite(values) & (np.rint(values) == values)).all())
    if not is_integral or values.min() < 0 or values.max() > MAX_LABEL:
        raise GhostifyError(
            f"{path}: its labels, {_describe(values)}, are not class numbers. Store whole numbers from 0 on."
        )
    return torch.from_numpy(values.reshape(count).astype(np.int64))


def _is_one_hot(rows: Array) -> bool:
    return rows.dtype.kind in REAL_KINDS and bool((((rows == 0) | (rows == 1)).all(1) & (rows.sum(1) == 1)).all())


def _describe(values: Array) -> str:
    if values.dtype.kind not in REAL_KINDS:
        return f"of type {values.dtype}"
    return f"between {values.min():g} and {values.max():g}"
