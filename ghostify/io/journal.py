"""New files that wait in a folder for their places: a write into a folder that cannot be exchanged as a whole.

The new files are complete when their folder gets the name `PENDING`, in one step. From then on they are the ones that
count, whether they were moved to their places or not.
"""

from __future__ import annotations

import os
from pathlib import Path

from ghostify.errors import GhostifyError
from ghostify.io.manifest import MANIFEST, entries
from ghostify.text import one_line

PENDING = ".ghostify-new"


def current_file(folder: Path, name: str) -> Path:
    """The file of that name; after an interrupted write the one that was not moved to its place yet."""
    pending = folder / PENDING
    return pending / name if not pending.is_symlink() and (pending / name).is_file() else folder / name


def finish_write(folder: Path) -> None:
    """Move the new files to their places, the manifest last; also after an interruption.

    Raises `GhostifyError`, with nothing moved, where a place is not in the folder itself, but behind a link.
    """
    pending = folder / PENDING
    if pending.is_symlink() or not pending.is_dir():
        return
    names = sorted((name for name in entries(pending) if not name.endswith("/")), key=lambda name: name == MANIFEST)
    for name in names:
        link = next((folder / parent for parent in Path(name).parents if (folder / parent).is_symlink()), None)
        if link is not None and link != folder:
            raise GhostifyError(f"{one_line(str(link))}: is a link, where a new file was to go. Remove the link.")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(pending / name, folder / name)
    remove_empty_folders(pending)


def remove_empty_folders(folder: Path) -> None:
    """Remove a folder and those in it, unless they hold files."""
    if folder.is_dir():
        for place in folder.iterdir():
            if place.is_dir() and not place.is_symlink():
                remove_empty_folders(place)
        if not any(folder.iterdir()):
            folder.rmdir()
