import pytest

from ghostify.io.atomic import staged_folder


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("merge", [False, True])
def test_a_folder_that_is_filled_takes_its_place(tmp_path, merge):
    for number in (1, 2):
        with staged_folder(tmp_path / "deep" / "out", merge=merge) as fresh:
            (fresh / "shared").write_text(str(number))
            (fresh / f"own{number}").touch()
            assert not (tmp_path / "deep" / "out" / f"own{number}").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == (["own1", "own2", "shared"] if merge else ["own2", "shared"])
    assert (tmp_path / "deep" / "out" / "shared").read_text() == "2"


def fill_badly(folder, merge):
    with staged_folder(folder, merge=merge) as fresh:
        (fresh / "half").touch()
        (fresh / "missing").read_text()


@pytest.mark.parametrize("merge", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, merge):
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()
    with pytest.raises(FileNotFoundError):
        fill_badly(out, merge)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["kept"]


def test_a_named_staging_folder_begins_empty(tmp_path):
    (tmp_path / ".fresh").mkdir()
    (tmp_path / ".fresh" / "stale").touch()
    with staged_folder(tmp_path / "out", staging=tmp_path / ".fresh") as fresh:
        assert names(fresh) == []
    assert names(tmp_path) == ["out"]
