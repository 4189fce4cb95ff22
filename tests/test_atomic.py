import os
import stat
from pathlib import Path

import pytest

from ghostify import GhostifyError
from ghostify.io import atomic
from ghostify.io.atomic import (
    COMPLETE,
    PARTIAL,
    _hidden_name,
    check_output_file,
    check_output_folder,
    staged_file,
    staged_folder,
    write_text_atomic,
)
from ghostify.io.manifest import MANIFEST, own_files


def content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}


def write(folder, overwrite=False, **files):
    with staged_folder(folder, overwrite=overwrite) as staging:
        for name, text in files.items():
            (staging / name).write_text(text)


@pytest.fixture(params=["exchange", "journal"])
def _each_way(request, monkeypatch):
    """Folders are exchanged, or, as on other systems, files are moved into them."""
    if request.param == "journal":
        monkeypatch.setattr(atomic, "exchange", lambda *_: False)


EACH_WAY = pytest.mark.usefixtures("_each_way")


@EACH_WAY
def test_new_files_replace_own_ones_and_others_of_ghostify_stay(tmp_path):
    out = tmp_path / "deep" / "out"
    write(out, model="1", export="1")
    write(out, model="2", page="2")
    assert content(tmp_path) == {"deep/out/model": "2", "deep/out/export": "1", "deep/out/page": "2"}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert set(own_files(out)) == {"model", "export", "page"}


@EACH_WAY
@pytest.mark.parametrize("name", ["notes.txt", "more/notes.txt", ".hidden", "link"])
def test_a_folder_with_files_of_the_user_is_refused_or_keeps_them(tmp_path, name):
    out = tmp_path / "out"
    write(out, model="1")
    mine = out / name
    mine.parent.mkdir(exist_ok=True)
    mine.symlink_to("nowhere") if name == "link" else mine.write_text("mine")
    number = mine.lstat().st_ino
    with pytest.raises(GhostifyError, match=rf"{name}: was not written by ghostify.* pass --overwrite"):
        write(out, model="2")
    assert (out / "model").read_text() == "1"
    write(out, overwrite=True, model="2")
    assert (out / "model").read_text() == "2"
    assert mine.lstat().st_ino == number
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@EACH_WAY
def test_empty_folders_and_edited_files_are_the_users(tmp_path):
    out = tmp_path / "out"
    write(out, model="1", page="1")
    (out / "empty").mkdir()
    with pytest.raises(GhostifyError, match="out/empty: was not written"):
        write(out, model="2")
    (out / "model").write_text("edited")
    with pytest.raises(GhostifyError, match=r"out/model: .* or was changed since\. Move it away"):
        write(out, overwrite=True, model="2")
    write(out, overwrite=True, page="2")
    assert content(out) == {"model": "edited", "page": "2"}
    assert (out / "empty").is_dir()


def test_names_that_the_user_has_taken_are_refused_even_with_overwrite(tmp_path):
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    with pytest.raises(GhostifyError, match="out/model: was not written"):
        write(out, overwrite=True, model="1")
    (out / "model").rmdir()
    (out / MANIFEST).write_text("mine")
    with pytest.raises(GhostifyError, match=f"{MANIFEST}: was not written"):
        write(out, overwrite=True, model="1")
    assert (out / MANIFEST).read_text() == "mine"
    assert not (out / "model").exists()


@EACH_WAY
def test_folders_within_a_folder_are_replaced_with_it(tmp_path):
    for number in "12":
        with staged_folder(tmp_path / "out") as staging:
            (staging / "a" / "b").mkdir(parents=True)
            (staging / "a" / "b" / "c").write_text(number)
    assert content(tmp_path) == {"out/a/b/c": "2"}
    write(tmp_path / "out", more="3")
    assert content(tmp_path) == {"out/a/b/c": "2", "out/more": "3"}


def fill_and_fail(folder):
    with staged_folder(folder) as staging:
        (staging / "half").touch()
        raise KeyboardInterrupt


def test_a_failure_changes_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill_and_fail(tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())
    write(tmp_path / "out", kept="1")
    with pytest.raises(KeyboardInterrupt):
        fill_and_fail(tmp_path / "out")
    assert content(tmp_path) == {"out/kept": "1"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_line(tmp_path):
    def write_on_full_disk():
        with staged_folder(tmp_path / "out"):
            raise OSError(28, "No space left on device")

    with pytest.raises(GhostifyError, match=r"out: cannot be written \(No space left on device\)"):
        write_on_full_disk()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["partial", "complete", "swapped"])
def test_leftovers_of_a_killed_process_are_removed_without_files_of_the_user(tmp_path, stage):
    out = tmp_path / "out"
    write(out, model="1")
    staging = atomic._staging_place(out)
    if stage == "partial":
        (staging / "partial").mkdir(parents=True)
        (staging / "partial" / "model").write_text("half")
    else:
        write(tmp_path / "other", model="new" if stage == "complete" else "old")
        if stage == "swapped":
            (tmp_path / "other" / "late").write_text("mine")
            (out / "late").write_text("also mine")
        staging.mkdir()
        (tmp_path / "other").rename(staging / "complete")
    check_output_folder(out, overwrite=True)
    late = {"out/late": "also mine", "out/late.1": "mine"} if stage == "swapped" else {}
    assert content(tmp_path) == {"out/model": "1", **late}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_that_the_user_adds_during_the_write_stays(tmp_path):
    with staged_folder(tmp_path / "out") as staging:
        (staging / "model").write_text("1")
    with staged_folder(tmp_path / "out") as staging:
        (staging / "model").write_text("2")
        (tmp_path / "out" / "notes.txt").write_text("mine")
    assert content(tmp_path) == {"out/model": "2", "out/notes.txt": "mine"}


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path):
    out = tmp_path / "out"
    with staged_folder(out) as staging:
        with pytest.raises(GhostifyError, match="out: another process is writing it"):
            write(out, model="second")
        (staging / "model").write_text("first")
    assert content(tmp_path) == {"out/model": "first"}
    write(out, model="second")
    assert content(tmp_path) == {"out/model": "second"}


def test_the_current_folder_keeps_its_place(tmp_path, monkeypatch):
    write(tmp_path / "out", model="1")
    monkeypatch.chdir(tmp_path / "out")
    number = Path.cwd().stat().st_ino
    write(tmp_path / "out", model="2")
    assert Path("model").read_text() == "2"
    assert (tmp_path / "out").stat().st_ino == number


def test_a_folder_whose_parent_cannot_be_written_to_is_filled_from_within(tmp_path, monkeypatch):
    write(tmp_path / "out", model="1")
    monkeypatch.setattr(os, "access", lambda place, _: Path(place) != tmp_path)
    with staged_folder(tmp_path / "out") as staging:
        assert staging.is_relative_to(tmp_path / "out")
        (staging / "model").write_text("2")
    assert content(tmp_path) == {"out/model": "2"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model", MANIFEST}


def test_links_to_folders_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    write(tmp_path / "out", model="1")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "model").read_text() == "1"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_rights_are_those_of_any_new_file_and_those_of_an_existing_folder_stay(tmp_path, mask):
    before = os.umask(mask)
    try:
        with staged_folder(tmp_path / "out") as staging:
            (staging / "model").touch(0o600)
        write_text_atomic(tmp_path / "page", "")
        folder, files = tmp_path / "out", [*(tmp_path / "out").iterdir(), tmp_path / "page"]
        assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o666 & ~mask}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
        folder.chmod(0o750)
        write(folder, model="2")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    finally:
        os.umask(before)


@pytest.mark.parametrize("place", [".", "/", "..", "file", "file/out", "n" * 300, "a\0b", "\udc80\ud800", None, 3])
def test_places_that_are_no_folders_are_refused_in_one_line(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(GhostifyError) as caught:
        check_output_folder(place)
    assert str(caught.value).isprintable()
    assert content(tmp_path) == {"file": "mine"}


@pytest.mark.parametrize(
    ("is_link", "message"), [(True, "is a link, where out is prepared"), (False, "is not a folder")]
)
def test_a_staging_place_that_is_not_a_folder_is_refused(tmp_path, is_link, message):
    (tmp_path / "mine" / "partial").mkdir(parents=True)
    (tmp_path / "mine" / "partial" / "file").touch()
    place = atomic._staging_place(tmp_path / "out")
    place.symlink_to("mine") if is_link else place.touch()
    with pytest.raises(GhostifyError, match=message):
        check_output_folder(tmp_path / "out")
    assert (tmp_path / "mine" / "partial" / "file").exists()


def test_a_folder_of_the_user_named_as_the_staging_within_stays(tmp_path):
    mine = tmp_path / "out" / ".ghostify-staging" / "mine"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(GhostifyError, match="mine: was not written by ghostify"):
        check_output_folder(tmp_path / "out")
    with staged_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "a").touch()
    assert mine.exists()
    assert (tmp_path / "out" / "a").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_check_leaves_nothing(tmp_path):
    check_output_folder(tmp_path / "a" / "b")
    check_output_file(tmp_path / "a" / "b.html", lambda _: True)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_in_one_step(tmp_path):
    file = tmp_path / "deep" / "page"
    write_text_atomic(file, "1")
    with staged_file(file) as staging:
        staging.write_text("2")
        assert file.read_text() == "1"
        with pytest.raises(GhostifyError, match="page: another process is writing it"):
            write_text_atomic(file, "3")
    assert content(tmp_path) == {"deep/page": "2"}
    file.chmod(0o600)
    write_text_atomic(file, "4")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def write_half_and_fail(file):
    with staged_file(file) as staging:
        staging.write_text("half")
        raise KeyboardInterrupt


def test_a_file_that_fails_stays_as_it_was(tmp_path):
    write_text_atomic(tmp_path / "page", "1")
    with pytest.raises(KeyboardInterrupt):
        write_half_and_fail(tmp_path / "page")
    assert content(tmp_path) == {"page": "1"}


def test_only_own_or_empty_files_are_replaced_unless_told(tmp_path):
    file = tmp_path / "page"
    file.touch()
    check_output_file(file, lambda _: False)
    file.write_text("mine")
    check_output_file(file, lambda f: f.read_text() == "mine")
    check_output_file(file, lambda _: False, overwrite=True)
    with pytest.raises(GhostifyError, match="page: was not written by ghostify"):
        check_output_file(file, lambda _: False)
    with pytest.raises(GhostifyError, match="is a folder, pipe or device"):
        check_output_file(tmp_path, lambda _: True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GhostifyError, match="is a folder, pipe or device"):
        write_text_atomic(tmp_path / "pipe", "")


def test_links_in_a_staging_folder_are_not_followed(tmp_path):
    staging, documents = _hidden_name(tmp_path / "out", "staging"), tmp_path / "documents"
    documents.mkdir()
    (documents / "letter").write_text("mine")
    staging.mkdir()
    for name in (PARTIAL, COMPLETE):
        (staging / name).symlink_to(documents)
    check_output_folder(tmp_path / "out")
    assert (documents / "letter").read_text() == "mine"
    assert not staging.exists()
