"""Files and folders that are written completely or not at all, whenever the process ends.

A new folder is filled beside the one that it replaces, and takes its place in one step. The user's files are neither
moved nor changed: where a folder holds some, or cannot be exchanged, the new files are moved into it by a journal.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Set
from pathlib import Path

from ghostify.errors import GhostifyError
from ghostify.io.exchange import exchange
from ghostify.io.journal import PENDING, finish_write, remove_empty_folders
from ghostify.io.lock import locked
from ghostify.io.manifest import (
    COMPLETE,
    DESCRIPTION,
    MANIFEST,
    PARTIAL,
    STAGING_INSIDE,
    entries,
    file_digest,
    foreign_entries,
    own_files,
    own_names,
    write_manifest,
)
from ghostify.io.output import (
    NOT_OURS,
    check_content,
    check_names,
    parents_created,
    resolved_file,
    resolved_folder,
    writing_to,
)
from ghostify.text import one_line

LAST = (DESCRIPTION, MANIFEST)  # they say which files are ghostify's own
NAME_LENGTH = 40


@contextlib.contextmanager
def staged_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to fill, whose files get into the folder `path` in one step when the block ends without an error.

    They replace ghostify's own files of the same names; all other files stay. Raises `GhostifyError` for a place that
    cannot be written to, that another process is writing to, or that holds files which are not ghostify's own, unless
    `overwrite` is given; and in any case where such a file has the name of a new one. Nothing is changed then.
    """
    with _prepared(path, overwrite) as (folder, staging):
        partial = staging / PARTIAL
        partial.mkdir()
        yield partial
        _commit(staging, folder)


def check_output_folder(path: str | Path, *, overwrite: bool = False) -> None:
    """Raise `GhostifyError` where `staged_folder` would, as far as that is known before the files; leaves nothing."""
    with _prepared(path, overwrite):
        pass


@contextlib.contextmanager
def staged_file(path: str | Path) -> Iterator[Path]:
    """An empty file to write, which gets the name `path` in one step when the block ends without an error.

    Raises `OSError`, and `GhostifyError` where another process is writing the file.
    """
    with _temporary_file(path) as (file, temporary):
        rights = stat.S_IMODE((file if file.exists() else temporary).stat().st_mode)
        yield temporary
        temporary.chmod(rights)
        _flush_file(temporary)
        os.replace(temporary, file)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a file of text in one step; raises as `staged_file`."""
    with staged_file(path) as file:
        file.write_text(text, encoding="utf-8")


def check_output_file(path: str | Path, is_own: Callable[[Path], bool], *, overwrite: bool = False) -> None:
    """Raise `GhostifyError` for a file that cannot be written; leaves nothing.

    So too for an existing file with content that is not ghostify's own, as `is_own` says, unless `overwrite` is given.
    """
    with writing_to(path), _temporary_file(path) as (file, temporary):
        temporary.unlink()
        if not overwrite and file.exists() and file.stat().st_size and not is_own(file):
            raise GhostifyError(
                f"{one_line(str(path))}: {NOT_OURS}. "
                f"Name another file, or pass --overwrite (overwrite=True) to replace it."
            )


@contextlib.contextmanager
def _temporary_file(path: str | Path) -> Iterator[tuple[Path, Path]]:
    """The resolved file, and an empty file beside it to rename or remove; it is removed when the block raises."""
    file = resolved_file(path)
    temporary = _hidden_name(file, "part")
    with parents_created(file), locked(temporary, lambda place: place.open("a").close(), file):
        try:
            yield file, temporary
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _prepared(path: str | Path, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """The resolved folder, checked, and an empty staging folder that no other process uses, removed afterwards."""
    with writing_to(path):
        folder = resolved_folder(path)
        staging = _staging_place(folder)
        with parents_created(folder), locked(staging, _make_staging, folder):
            try:
                _remove_leftovers(staging, folder)
                finish_write(folder)
                check_content(folder, overwrite)
                yield folder, staging
            finally:
                _remove_leftovers(staging, folder)
                with contextlib.suppress(OSError):  # not empty
                    staging.rmdir()


def _make_staging(place: Path) -> None:
    """Create a staging folder unless it is there; `locked` refuses a link of its name."""
    if place.exists() and not place.is_dir():
        raise GhostifyError(f"{one_line(str(place))}: is not a folder. Remove it, or name another place.")
    place.mkdir(exist_ok=True)


def _staging_place(folder: Path) -> Path:
    """A name beside the folder, or within one that is mounted or whose parent folder cannot be written to."""
    if folder.is_dir() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)):
        return folder / STAGING_INSIDE
    return _hidden_name(folder, "staging")


def _hidden_name(path: Path, kind: str) -> Path:
    """A hidden name in the same folder, which is not too long where the path's own is not."""
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    return path.with_name(f".{path.name[:NAME_LENGTH]}.ghostify-{kind}-{digest}")


def partial_folder(path: str | Path) -> Path:
    """The folder that `staged_folder` gives to fill, for other processes that write into it as well."""
    return _staging_place(resolved_folder(path)) / PARTIAL


def remove_own_files(folder: Path) -> None:
    """Remove ghostify's own files of a folder, and the folder unless it holds others."""
    for name in sorted(own_names(folder), key=lambda name: name in LAST):
        (folder / name).unlink()
    remove_empty_folders(folder)


def _remove_leftovers(staging: Path, folder: Path) -> None:
    """Remove what an interrupted or a finished write left; files that are not ghostify's own go into `folder`."""
    complete = staging / COMPLETE
    for place in (staging / PARTIAL, complete):
        if place.is_symlink():  # ghostify makes none
            place.unlink()
    shutil.rmtree(staging / PARTIAL, ignore_errors=True)
    for name in [*foreign_entries(complete)]:
        place = _free_place(folder / name)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(complete / name, place)
    remove_own_files(complete)


def _free_place(place: Path) -> Path:
    """The place, or one with a number at its end where the name is taken."""
    number, free = 0, place
    while os.path.lexists(free):
        number += 1
        free = place.with_name(f"{place.name}.{number}")
    return free


def _commit(staging: Path, folder: Path) -> None:
    """Move the complete new files into the folder in one step, beside those that it holds."""
    partial, complete, previous = staging / PARTIAL, staging / COMPLETE, own_files(folder)
    digests = {name: file_digest(partial / name) for name in entries(partial) if not name.endswith("/")}
    check_names(folder, [*digests, MANIFEST])
    write_manifest(partial, {**previous, **digests})
    rights = stat.S_IMODE((partial / MANIFEST).stat().st_mode)
    for name in digests:
        (partial / name).chmod(rights)  # some libraries write files for their owner alone
    _flush(partial)
    partial.rename(complete)
    if not folder.exists():
        complete.rename(folder)
    elif any(foreign_entries(folder)) or not _exchanged(complete, folder, previous.keys() - digests.keys()):
        complete.rename(folder / PENDING)
        finish_write(folder)
    _flush_folder(folder.parent)


def _exchanged(complete: Path, folder: Path, kept: Set[str]) -> bool:
    """Exchange the folders, with the files in `kept` in both; False, with nothing changed, where that is impossible."""
    if complete.is_relative_to(folder) or folder in (Path.cwd(), *Path.cwd().parents):
        return False
    is_done = False
    try:
        shutil.copymode(folder, complete)
        for name in kept:
            (complete / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / name, complete / name)
        is_done = exchange(complete, folder)
    except OSError:
        pass  # a file system without hard links
    finally:
        if not is_done:
            for name in kept:
                (complete / name).unlink(missing_ok=True)
    return is_done


def _flush(folder: Path) -> None:
    """Wait until the files of a folder are on the disk."""
    for place in folder.iterdir():
        _flush(place) if place.is_dir() else _flush_file(place)
    _flush_folder(folder)


def _flush_file(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system opens or flushes folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
