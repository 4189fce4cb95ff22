"""Files and folders that one process at a time may fill; the system releases them when the process ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ghostify.errors import GhostifyError
from ghostify.text import one_line

try:
    import fcntl
except ImportError:  # only POSIX systems have it; elsewhere two processes are not kept apart
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(place: Path, create: Callable[[Path], None], output: Path) -> Iterator[None]:
    """Lock the file or folder `place`, which `create` creates where it is missing, until the block ends.

    Raises `GhostifyError` naming `output` where another process, or another thread, has locked it, and for a link.
    """
    descriptor = _lock(place, create, output)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # a forked process may keep the descriptor open
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _lock(place: Path, create: Callable[[Path], None], output: Path) -> int | None:
    while True:
        if place.is_symlink():  # ghostify makes none: what is written to it would go to another place
            raise GhostifyError(f"{one_line(str(place))}: is a link, where {output.name} is prepared. Remove the link.")
        create(place)
        if fcntl is None:
            return None
        try:
            descriptor = os.open(place, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:  # its former owner has just removed it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            busy = f"{one_line(str(output))}: another process is writing it"
            raise GhostifyError(f"{busy}. Wait for it, or name another place.") from error
        except OSError:
            return descriptor  # a file system without locks
        if _is_at(descriptor, place):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, place: Path) -> bool:
    """Whether the open file or folder still has that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(place))
    except FileNotFoundError:
        return False
