"""Atomic replacement of text files and folders."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_text_atomic(file: Path, text: str) -> None:
    """Write a file in the same folder, then rename it to `file` in one step."""
    staging = file.with_name(f".{file.name}-{os.getpid()}")
    staging.write_text(text)
    staging.replace(file)


@contextlib.contextmanager
def staged_folder(folder: Path, *, staging: Path | None = None, merge: bool = False) -> Iterator[Path]:
    """A new folder to fill, which replaces `folder` when the block ends, and is removed when it raises.

    It lies in the same parent folder under a random name, or at `staging`, which is emptied first. With `merge` the
    files of an existing `folder` stay and those of the same name are replaced; else it is replaced as a whole.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if staging is None:
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        os.chmod(staging, 0o755)
    else:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    try:
        yield staging
        if merge and folder.exists():
            for file in staging.iterdir():
                file.replace(folder / file.name)
        else:
            _replace_folder(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_folder(staging: Path, folder: Path) -> None:
    """Rename `staging` to `folder`; an existing `folder` is restored if that fails."""
    if not folder.exists():
        staging.rename(folder)
        return
    previous = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent)) / "was"
    folder.rename(previous)
    try:
        staging.rename(folder)
    except OSError:
        previous.rename(folder)
        raise
    finally:
        shutil.rmtree(previous.parent, ignore_errors=True)
