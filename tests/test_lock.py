import os
import signal
from pathlib import Path

import pytest

from ghostify import GhostifyError
from ghostify.io.lock import locked

OUT = Path("out")


def make(place):
    place.mkdir(exist_ok=True)


def test_one_at_a_time(tmp_path):
    with locked(tmp_path / "lock", make, OUT):
        with pytest.raises(GhostifyError, match=r"out: another process is writing it\. Wait"):
            locked(tmp_path / "lock", make, OUT).__enter__()
        with locked(tmp_path / "other", make, OUT):
            pass
    with locked(tmp_path / "lock", make, OUT):
        pass


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    read, write = os.pipe()
    child = os.fork()
    if not child:  # a process that is killed while it has the lock
        with locked(tmp_path / "lock", make, OUT):
            os.write(write, b"x")
            signal.pause()
    os.read(read, 1)
    with pytest.raises(GhostifyError):
        locked(tmp_path / "lock", make, OUT).__enter__()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path / "lock", make, OUT):
        pass
    os.close(read)
    os.close(write)


def test_a_place_that_its_owner_removes_meanwhile_is_created_again(tmp_path):
    place, removals = tmp_path / "lock", []

    def make_and_lose(folder):
        folder.mkdir(exist_ok=True)
        if len(removals) < 2:
            removals.append(folder.rmdir())

    with locked(place, make_and_lose, OUT):
        assert place.exists()
    assert len(removals) == 2


def test_a_link_is_not_locked(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "other")
    with pytest.raises(GhostifyError, match=r"lock: is a link, where out is prepared\. Remove the link"):
        locked(tmp_path / "lock", make, OUT).__enter__()
    assert not (tmp_path / "other").exists()
