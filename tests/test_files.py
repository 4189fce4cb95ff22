"""Files are regular, of bounded size and within their folder; JSON is of bounded depth and length."""

import json
import os
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostify import GhostifyError
from ghostify.files import DEPTH_LIMIT, DIGIT_LIMIT, VALUE_LIMIT, open_regular, parse_json, read_json, read_text

LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    LEAVES | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@settings(max_examples=30, deadline=None)
@given(VALUES)
def test_what_json_writes_is_read(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False, indent=1)) == value


def test_brackets_and_commas_in_texts_do_not_count():
    text = '\\"[{' * DEPTH_LIMIT + "\\" + "," * VALUE_LIMIT
    assert parse_json(json.dumps([text, {text: text}])) == [text, {text: text}]


def nested(levels, opening="[", closing="]"):
    return opening * levels + "1" + closing * levels


def test_json_is_nested_up_to_the_limit():
    assert json.dumps(parse_json(nested(DEPTH_LIMIT))) == nested(DEPTH_LIMIT)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (nested(DEPTH_LIMIT + 1), "nested more than 100 levels deep"),
        (nested(DEPTH_LIMIT + 1, '{"a": ', "}"), "nested more than 100 levels deep"),
        ("[" * 1_000_000, "nested more than 100 levels deep"),
        ("[" + "0," * VALUE_LIMIT + "0]", "more than 2,000,000 values"),
        ('"' * (4 * VALUE_LIMIT + 1), "more than 2,000,000 values"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
        ("[1, NaN]", "the number NaN is not finite"),
        ("-Infinity", "the number -Infinity is not finite"),
        ("1e999", "the number 1e999 is not finite"),
        ("1" * (DIGIT_LIMIT + 1), "has more than 100 digits"),
        ('["\\ud800"]', "surrogates not allowed"),
        ("[]]]]", "Extra data"),
        ("[1, ", "Expecting value"),
    ],
)
def test_json_of_any_other_kind_is_refused(text, problem):
    with pytest.raises(ValueError, match=problem):
        parse_json(text)


def test_infinite_numbers_are_read_where_they_are_permitted():
    assert str(parse_json("[NaN, -Infinity, 1e999]", finite=False)) == "[nan, -inf, inf]"


def test_a_file_is_read_as_text_and_as_json(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"é": 1}', encoding="utf-8")
    assert read_text(file) == '{"é": 1}'
    assert read_json(file, folder=tmp_path) == {"é": 1}


def pipe(path):
    os.mkfifo(path)


def bound_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (Path.absolute, "cannot be read (No such file or directory)"),
        (Path.mkdir, "is a folder, not a file"),
        (pipe, "is a pipe, device or socket, not a file"),
        (bound_socket, "is a pipe, device or socket, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a pipe, device or socket, not a file"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: path.write_bytes(b"12345"), "is larger than"),
        (lambda path: path.write_bytes(b"\xff"), "is not UTF-8 text (invalid start byte at byte 0)"),
    ],
    ids=["missing", "folder", "pipe", "socket", "device", "loop", "large", "binary"],
)
def test_other_than_small_regular_text_files_are_refused(tmp_path, monkeypatch, make, problem):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    file = Path("file")
    make(file)
    with pytest.raises(GhostifyError, match=rf"^file: {re.escape(problem)}.*\. Save it again\.$"):
        read_text(file, limit=4, remedy="Save it again.")


def test_a_sparse_file_is_refused_by_its_size(tmp_path):
    file = tmp_path / "large.json"
    with file.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(GhostifyError, match="is larger than 64 MB"):
        read_json(file)


def test_a_json_file_that_is_refused_is_named(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("[" * 10_000)
    with pytest.raises(
        GhostifyError, match=rf"^{re.escape(str(file))}: .*nested more than 100 levels deep.*\. Stop\.$"
    ):
        read_json(file, remedy="Stop.")


def test_links_stay_within_the_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "real.json").write_text("1")
    (folder / "inner.json").symlink_to("real.json")
    (tmp_path / "other.json").write_text("2")
    (folder / "outer.json").symlink_to("../other.json")
    assert read_json(folder / "inner.json", folder=folder) == 1
    assert read_json(folder / "outer.json") == 2  # the user's own link
    with pytest.raises(GhostifyError, match=r"outer\.json: is a link out of"):
        read_json(folder / "outer.json", folder=folder)


def test_a_folder_may_be_a_link_itself(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.json").write_text("1")
    (tmp_path / "link").symlink_to("folder")
    assert read_json(tmp_path / "link/a.json", folder=tmp_path / "link") == 1


def test_the_open_file_is_what_is_read(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"before")
    with open_regular(file) as stream:
        file.unlink()
        file.write_bytes(b"after")
        assert stream.read() == b"before"
