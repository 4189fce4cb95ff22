"""Image files, decoded as timm's loader does: to 8-bit RGB or greyscale, without regard to EXIF orientation."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ghostify.errors import GhostifyError
from ghostify.files import open_regular

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".webp", ".tif", ".tiff")
UNREADABLE = (  # what Pillow raises for files that are damaged or of an unknown kind
    OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, OverflowError, MemoryError,
    NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
MAX_8_BITS, MAX_16_BITS = 255, 65535
MAX_DEPTH = 100  # of folders in folders


def list_images(path: Path) -> tuple[list[Path], list[str]]:
    """The images in a folder, and its class folders in alphabetical order.

    There are no classes where only one folder holds images, or where images lie outside of the class folders. Hidden
    files and folders, whose names begin with a dot, are not read, nor are files of other suffixes; links are followed.
    Raises `GhostifyError` for a folder that cannot be read, that holds no images, or a class folder that holds none.
    """
    files = sorted(_image_files(path))
    if not files:
        raise GhostifyError(f"{path}: holds no images. Name a folder with {', '.join(IMAGE_SUFFIXES)} files.")
    relative_paths = [file.relative_to(path) for file in files]
    classes = sorted({p.parts[0] for p in relative_paths if len(p.parts) > 1})
    if len(classes) < 2 or any(len(p.parts) == 1 for p in relative_paths):
        return files, []
    empty = sorted(p.name for p in path.iterdir() if p.is_dir() and not _is_hidden(p.name) and p.name not in classes)
    if empty:
        raise GhostifyError(f"{path / empty[0]}: holds no images. Put images into every class folder, or remove it.")
    return files, classes


def class_of(file: Path, folder: Path) -> str:
    """The class folder of an image in `folder`."""
    return file.relative_to(folder).parts[0]


def _image_files(folder: Path, visited: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The image files below a folder; a link to one of the folders above it, which are `visited`, is not followed."""
    if len(visited) >= MAX_DEPTH:
        raise GhostifyError(f"{folder}: is more than {MAX_DEPTH} levels deep. Move its images up, or remove it.")
    above = visited | {os.path.realpath(folder)}
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise GhostifyError(f"{folder}: cannot be read ({error.strerror}). Check its rights, or remove it.") from error
    for entry in entries:
        if _is_hidden(entry.name):
            continue
        if entry.is_dir():
            if os.path.realpath(entry.path) not in above:
                yield from _image_files(Path(entry.path), above)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            if not entry.is_file():
                raise GhostifyError(f"{entry.path}: is not a regular file. Remove it.")
            yield Path(entry.path)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def decode_image(file: Path, mode: str) -> Image.Image:
    """An image file in 8 bits, as "RGB" or "L"; greater depths are scaled, transparency is dropped.

    Raises `GhostifyError` for a file that cannot be read, or that holds numbers without a known range.
    """
    try:
        with open_regular(file) as stream, Image.open(stream) as image:
            image.load()
            return _in_8_bits(image).convert(mode)
    except UNREADABLE as error:
        raise GhostifyError(
            f"{file}: is not a readable image ({type(error).__name__}: {error}). Replace or remove it."
        ) from error


def _in_8_bits(image: Image.Image) -> Image.Image:
    """An image of one channel with more than 8 bits, scaled to 8 bits; others as they are."""
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # the same colours; Pillow warns where it is left out
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.asarray(image)
    top = 1 if image.mode == "F" else MAX_16_BITS
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top):
        raise ValueError(f"values between {values.min():g} and {values.max():g}, not between 0 and {top}")
    return Image.fromarray(np.rint(values.astype(np.float64) * (MAX_8_BITS / top)).astype(np.uint8))
