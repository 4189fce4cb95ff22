"""Text files and folders that are complete or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_text_atomic(file: Path, text: str) -> None:
    """Write a file beside its place, then put it there in one step."""
    fresh = file.with_name(f".{file.name}-{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(file)


@contextlib.contextmanager
def staged_folder(folder: Path, *, staging: Path | None = None, merge: bool = False) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends, and is removed when it raises.

    It lies beside `folder` under a random name, or at `staging`, whatever is there being removed first. With `merge`
    the files of an existing `folder` stay and those of the same name are replaced; else it is replaced as a whole.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if staging is None:
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        os.chmod(fresh, 0o755)
    else:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        fresh = staging
    try:
        yield fresh
        if merge and folder.exists():
            for file in fresh.iterdir():
                file.replace(folder / file.name)
        else:
            _replace_folder(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _replace_folder(fresh: Path, folder: Path) -> None:
    """Put `fresh` in the place of `folder`; what was there comes back if that fails."""
    if not folder.exists():
        fresh.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent)) / "was"
    folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)
