import pytest

from ghostify import GhostifyError
from ghostify.io.journal import PENDING, current_file, finish_write, remove_empty_folders
from ghostify.io.manifest import MANIFEST, file_digest, write_manifest

FILES = ("a", "b", "sub/c")
NAMES = (*FILES, MANIFEST)


def fill(folder, text):
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    write_manifest(folder, {name: file_digest(folder / name) for name in FILES})


@pytest.mark.parametrize("moved", range(len(NAMES) + 1))
def test_new_files_count_from_the_start_and_get_to_their_places(tmp_path, moved):
    fill(tmp_path, "old")
    fill(tmp_path / PENDING, "new")
    (tmp_path / "mine").write_text("mine")
    for name in NAMES[:moved]:  # then the process was killed
        (tmp_path / PENDING / name).replace(tmp_path / name)
    assert {current_file(tmp_path, name).read_text() for name in FILES} == {"new"}
    assert current_file(tmp_path, "mine").read_text() == "mine"
    finish_write(tmp_path)
    assert {(tmp_path / name).read_text() for name in FILES} == {"new"}
    assert not (tmp_path / PENDING).exists()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_link_is_not_a_journal(tmp_path):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "else", "else")
    (tmp_path / "out" / PENDING).symlink_to(tmp_path / "else")
    assert current_file(tmp_path / "out", "a") == tmp_path / "out" / "a"
    finish_write(tmp_path / "out")
    assert (tmp_path / "else" / "a").exists()


def test_a_folder_of_the_user_with_that_name_is_not_a_journal(tmp_path):
    (tmp_path / PENDING).mkdir()
    for file in (tmp_path / PENDING / "a", tmp_path / "a"):
        file.write_text(str(file))
    finish_write(tmp_path)
    assert all(file.read_text() == str(file) for file in (tmp_path / PENDING / "a", tmp_path / "a"))


def test_a_file_that_the_user_adds_after_a_kill_is_not_replaced(tmp_path):
    fill(tmp_path / PENDING, "new")
    (tmp_path / "b").write_text("mine")
    with pytest.raises(GhostifyError, match=r"b: was not written by ghostify"):
        finish_write(tmp_path)
    assert (tmp_path / "b").read_text() == "mine"
    (tmp_path / "b").unlink()
    finish_write(tmp_path)
    assert {(tmp_path / name).read_text() for name in FILES} == {"new"}


def test_only_empty_folders_are_removed(tmp_path):
    (tmp_path / "out" / "a" / "b").mkdir(parents=True)
    (tmp_path / "out" / "c").mkdir()
    (tmp_path / "out" / "c" / "file").touch()
    remove_empty_folders(tmp_path / "out")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["out", "out/c", "out/c/file"]


def test_new_files_do_not_follow_a_link_out_of_the_folder(tmp_path):
    folder, other = tmp_path / "out", tmp_path / "other"
    fill(folder / PENDING, "new")
    other.mkdir()
    (other / "c").write_text("mine")
    (folder / "sub").symlink_to(other)
    with pytest.raises(GhostifyError, match=r"out/sub: is a link, where a new file was to go\. Remove"):
        finish_write(folder)
    assert (other / "c").read_text() == "mine"
    assert not (folder / "a").exists()
