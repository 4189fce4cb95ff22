"""New files that wait in a folder for their places: a write into a folder that cannot be exchanged as a whole.

The new files are complete when their folder gets the name `PENDING`, in one step. From then on they are the ones that
count, whether they were moved to their places or not.
"""

from __future__ import annotations

import os
from pathlib import Path

from ghostify.errors import GhostifyError
from ghostify.io.manifest import DESCRIPTION, MANIFEST, entries
from ghostify.io.output import check_names
from ghostify.text import one_line

PENDING = ".ghostify-new"


def current_file(folder: Path, name: str) -> Path:
    """The file of that name; after an interrupted write the one that was not moved to its place yet."""
    pending = folder / PENDING
    return pending / name if not pending.is_symlink() and (pending / name).is_file() else folder / name


def finish_write(folder: Path) -> None:
    """Move the new files to their places, the manifest last; also after an interruption.

    A folder of that name without a manifest is the user's. Raises `GhostifyError`, with nothing moved, where a file of
    the user has the name of a new one, and where the way to a place is through a link.
    """
    pending = folder / PENDING
    if pending.is_symlink() or not pending.is_dir():
        return
    if (pending / MANIFEST).is_file():
        names = [name for name in entries(pending) if not name.endswith("/")]
        _check_links(folder, names)
        check_names(folder, names)
        for name in sorted(names, key=lambda name: (name == MANIFEST, name == DESCRIPTION)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(pending / name, folder / name)
    remove_empty_folders(pending)


def _check_links(folder: Path, names: list[str]) -> None:
    for name in names:
        for parent in Path(name).parents[:-1]:
            if (folder / parent).is_symlink():
                place = one_line(str(folder / parent))
                raise GhostifyError(f"{place}: is a link, where a new file was to go. Remove the link.")


def remove_empty_folders(folder: Path) -> None:
    """Remove a folder and those in it, unless they hold files."""
    if folder.is_dir():
        for place in folder.iterdir():
            if place.is_dir() and not place.is_symlink():
                remove_empty_folders(place)
        if not any(folder.iterdir()):
            folder.rmdir()
