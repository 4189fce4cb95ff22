"""Checks of the places where results go, and the one line for what cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from ghostify.errors import GhostifyError
from ghostify.io.manifest import foreign_entries, own_names
from ghostify.text import one_line

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
NOT_OURS = "was not written by ghostify, or was changed since"


@contextlib.contextmanager
def writing_to(path: str | Path) -> Iterator[None]:
    """Errors of the system while writing as one `GhostifyError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise GhostifyError(
            f"{one_line(str(path))}: cannot be written ({error.strerror or error}). "
            f"Check its rights and the free space, or name another place."
        ) from error


def is_disk_error(error: BaseException) -> bool:
    """Whether a disk is full, read-only or broken, whatever was written."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def resolved_folder(path: str | Path) -> Path:
    """The folder that a path names, links followed; raises `GhostifyError` for files and for paths without a name."""
    folder = as_path(path)
    if folder.name in ("", ".."):
        raise GhostifyError(f"{folder}: does not name a new folder. Name one, such as {folder / 'out'}.")
    kind = _kind(folder)
    if kind is not None and not stat.S_ISDIR(kind):
        raise GhostifyError(f"{one_line(str(folder))}: is a file. Name a folder.")
    return Path(os.path.realpath(folder))


def resolved_file(path: str | Path) -> Path:
    """The file that a path names, links followed; raises `GhostifyError` for folders, pipes and devices."""
    file = as_path(path)
    kind = stat.S_IFDIR if file.name in ("", "..") else _kind(file)
    if kind is not None and not stat.S_ISREG(kind):
        raise GhostifyError(f"{one_line(str(file))}: is a folder, pipe or device. Name a file.")
    return Path(os.path.realpath(file))


def as_path(path: str | Path) -> Path:
    """The path; raises `GhostifyError` for what cannot be the name of a file."""
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("it has a null character")
        return Path(os.fsdecode(path))
    except TypeError as error:
        raise GhostifyError(f"path: is a {type(path).__name__}. Pass the name of a file or folder.") from error
    except ValueError as error:
        raise GhostifyError(f"{one_line(str(path))}: is not a file name ({error}). Use another one.") from error


def check_unicode(path: str | Path) -> None:
    """Raise `GhostifyError` for a place whose name in full is not Unicode, which ONNX Runtime and TensorBoard need."""
    place = os.path.realpath(as_path(path))
    try:
        os.fsencode(place).decode()
    except UnicodeDecodeError as error:
        raise GhostifyError(f"{one_line(place)}: is not UTF-8 text ({error.reason}). Use another name.") from error


def _kind(path: Path) -> int | None:
    """The type of what the path names, or None if nothing is there."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def check_content(folder: Path, overwrite: bool) -> None:
    """Raise `GhostifyError` for a folder that holds files which are not ghostify's own; not with `overwrite`."""
    first = None if overwrite else next(foreign_entries(folder), None)
    if first is not None:
        raise GhostifyError(
            f"{one_line(str(folder / first))}: {NOT_OURS}. Name another folder, or pass --overwrite (overwrite=True), "
            f"which keeps such files and replaces only ghostify's own."
        )


def check_names(folder: Path, names: Iterable[str]) -> None:
    """Raise `GhostifyError` if a file that will be written has the name of something that is not ghostify's own."""
    replaceable = own_names(folder)
    for name in names:
        parents = [folder / parent for parent in Path(name).parents if parent.name]
        obstacles = [place for place in parents if os.path.lexists(place) and not _is_plain_folder(place)]
        if os.path.lexists(folder / name) and name not in replaceable:
            obstacles.append(folder / name)
        if obstacles:
            raise GhostifyError(f"{one_line(str(obstacles[0]))}: {NOT_OURS}. Move it away, or name another folder.")


def _is_plain_folder(place: Path) -> bool:
    return place.is_dir() and not place.is_symlink()


@contextlib.contextmanager
def parents_created(place: Path) -> Iterator[None]:
    """The folder that `place` lies in, created where it is missing; what stays empty is removed afterwards."""
    missing = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()
