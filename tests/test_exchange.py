import sys

import pytest

from ghostify.io.exchange import exchange

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot exchange folders")


@ON_LINUX
def test_two_folders_exchange_their_names(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()


@ON_LINUX
def test_what_is_not_there_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").exists()


@ON_LINUX
def test_what_the_system_cannot_do_changes_nothing(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not exchange(tmp_path / "a", tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").exists()


def test_other_systems_are_left_to_the_journal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "other")
    assert not exchange(tmp_path, tmp_path)
