import json
import os

import pytest

from ghostify import GhostifyError
from ghostify.io import manifest
from ghostify.io.manifest import (
    DESCRIPTION,
    MANIFEST,
    TENSORS,
    changed_files,
    content_digest,
    entries,
    file_digest,
    foreign_entries,
    own_files,
    own_names,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (folder / name).write_text(name)
    write_manifest(folder, {name: file_digest(folder / name) for name in ("a", "sub/b")})
    return folder


def test_recorded_files_are_own_while_they_are_unchanged(folder):
    assert set(own_files(folder)) == {"a", "sub/b"}
    assert own_names(folder) == {"a", "sub/b", MANIFEST}
    assert not list(foreign_entries(folder))
    assert not list(changed_files(folder))
    (folder / "a").write_text("edited")
    (folder / "mine").touch()
    (folder / "sub" / "empty").mkdir()
    assert set(own_files(folder)) == {"sub/b"}
    assert list(foreign_entries(folder)) == ["a", "mine", "sub/empty/"]
    assert list(changed_files(folder)) == ["a"]
    (folder / "sub" / "b").unlink()
    assert list(changed_files(folder)) == ["a", "sub/b"]


def test_links_are_not_own_files(folder, tmp_path):
    (folder / "a").rename(tmp_path / "a")
    (folder / "a").symlink_to(tmp_path / "a")
    (folder / "sub").rename(tmp_path / "sub")
    (folder / "sub").symlink_to(tmp_path / "sub")
    assert own_files(folder) == {}
    assert list(foreign_entries(folder)) == ["a", "sub"]


@pytest.mark.parametrize("name", ["null\0", "../secret", "/secret", "sub/../../secret"])
def test_names_outside_the_folder_are_not_own_files(tmp_path, folder, name):
    (tmp_path / "secret").write_text("mine")
    write_manifest(folder, {name.replace("/secret", f"{tmp_path}/secret") if name[0] == "/" else name: "x"})
    recorded = json.loads((folder / MANIFEST).read_text())
    recorded["files"] = dict.fromkeys(recorded["files"], file_digest(tmp_path / "secret"))
    (folder / MANIFEST).write_text(json.dumps(recorded))
    assert own_files(folder) == {}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 99, "files": {}}', '{"format": 1, "files": []}', "[" * 100_000]
)
def test_a_manifest_of_something_else_is_the_users(folder, text):
    (folder / MANIFEST).write_text(text)
    assert own_names(folder) == set()
    assert MANIFEST in list(foreign_entries(folder))


def test_a_saved_model_without_a_manifest_is_own_where_it_is_intact(tmp_path):
    (tmp_path / TENSORS).write_text("weights")
    (tmp_path / "export").touch()
    saved = {"format": 2, "tensors": file_digest(tmp_path / TENSORS)}
    (tmp_path / DESCRIPTION).write_text(json.dumps({**saved, "digest": content_digest(saved)}))
    assert own_names(tmp_path) == {TENSORS, DESCRIPTION}
    assert list(foreign_entries(tmp_path)) == ["export"]
    (tmp_path / TENSORS).write_text("others")
    assert own_names(tmp_path) == {DESCRIPTION}
    (tmp_path / DESCRIPTION).write_text(json.dumps({**saved, "digest": "x"}))
    assert own_names(tmp_path) == set()


def test_a_digest_is_computed_once_until_the_file_changes(tmp_path, monkeypatch):
    file, computed = tmp_path / "a", []
    file.write_text("1")
    os.utime(file, ns=(0, 0))
    monkeypatch.setattr(manifest, "RECENT_NS", -(10**18))
    monkeypatch.setattr(manifest, "_compute_digest", lambda f: computed.append(f.read_text()) or f.read_text())
    assert [file_digest(file) for _ in range(2)] == ["1", "1"]
    file.write_text("2")
    assert [file_digest(file) for _ in range(2)] == ["2", "2"]
    assert computed == ["1", "2"]


def test_a_file_that_has_just_changed_is_read_each_time(tmp_path):
    file, digests = tmp_path / "a", set()
    for number in range(100):
        file.write_text(f"{number:03}")
        digests.add(file_digest(file))
    assert len(digests) == 100


def test_entries_are_files_links_and_empty_folders(folder):
    (folder / "none").mkdir()
    (folder / "link").symlink_to("none")
    assert list(entries(folder)) == ["a", MANIFEST, "link", "none/", "sub/b"]
    assert list(entries(folder / "nothing")) == []


def test_folders_in_folders_without_end_are_refused(folder):
    (folder / ("d/" * (manifest.MAX_DEPTH + 2))).mkdir(parents=True)
    with pytest.raises(GhostifyError, match="more than 100 levels deep"):
        list(manifest.entries(folder))
