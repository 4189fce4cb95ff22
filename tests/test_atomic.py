import pytest

from ghostify.io.atomic import staged_folder


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("merge", [False, True])
def test_a_filled_folder_replaces_the_previous_one(tmp_path, merge):
    for number in (1, 2):
        with staged_folder(tmp_path / "deep" / "out", merge=merge) as staging:
            (staging / "shared").write_text(str(number))
            (staging / f"only{number}").touch()
            assert not (tmp_path / "deep" / "out" / f"only{number}").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == (["only1", "only2", "shared"] if merge else ["only2", "shared"])
    assert (tmp_path / "deep" / "out" / "shared").read_text() == "2"


def fill_and_fail(folder, merge):
    with staged_folder(folder, merge=merge) as staging:
        (staging / "half").touch()
        (staging / "missing").read_text()


@pytest.mark.parametrize("merge", [False, True])
def test_a_failure_changes_nothing(tmp_path, merge):
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()
    with pytest.raises(FileNotFoundError):
        fill_and_fail(out, merge)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["kept"]


def test_a_named_staging_folder_is_emptied_first(tmp_path):
    (tmp_path / ".staging").mkdir()
    (tmp_path / ".staging" / "stale").touch()
    with staged_folder(tmp_path / "out", staging=tmp_path / ".staging") as staging:
        assert names(staging) == []
    assert names(tmp_path) == ["out"]
