"""Files that may come from others: regular, of bounded size, and JSON of bounded depth and length."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ghostify.errors import GhostifyError

MEGABYTE = 2**20
TEXT_LIMIT = 64 * MEGABYTE  # bytes of a text file
DEPTH_LIMIT, VALUE_LIMIT, DIGIT_LIMIT = 100, 2_000_000, 100  # of JSON: its nesting, values, and a number's length
REMEDY = "Name another file."
FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"))
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
BRACKETS = re.compile(r"[\[\]{}]")


@contextlib.contextmanager
def open_regular(
    path: str | Path, *, limit: int | None = None, folder: Path | None = None, remedy: str = REMEDY
) -> Iterator[BinaryIO]:
    """A regular file of at most `limit` bytes, open for reading; pipes and devices are neither opened nor waited for.

    The path may be a link, but with `folder` not to a file outside of it. Raises `GhostifyError` naming the path.
    """
    try:
        place = Path(path).resolve(strict=True)
        if folder is not None and not place.is_relative_to(folder.resolve()):
            raise GhostifyError(f"{path}: is a link out of {folder}. Replace it by the file that it names.")
        _check_regular(place.stat(), path, limit, remedy)  # a device must not even be opened
        descriptor = os.open(place, FLAGS | getattr(os, "O_NOFOLLOW", 0))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise GhostifyError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}). {remedy}"
        ) from error
    with open(descriptor, "rb") as stream:
        _check_regular(os.fstat(descriptor), path, limit, remedy)
        yield stream


def _check_regular(facts: os.stat_result, path: str | Path, limit: int | None, remedy: str) -> None:
    if not stat.S_ISREG(facts.st_mode):
        kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "a pipe, device or socket"
        raise GhostifyError(f"{path}: is {kind}, not a file. {remedy}")
    if limit is not None and facts.st_size > limit:
        raise GhostifyError(f"{path}: is larger than {limit / MEGABYTE:g} MB. {remedy}")


def read_text(path: str | Path, *, limit: int = TEXT_LIMIT, folder: Path | None = None, remedy: str = REMEDY) -> str:
    """The text of a regular UTF-8 file of at most `limit` bytes (see `open_regular`); raises `GhostifyError`."""
    with open_regular(path, limit=limit, folder=folder, remedy=remedy) as stream:
        try:
            content = stream.read(limit + 1)
        except OSError as error:
            raise GhostifyError(f"{path}: cannot be read ({error.strerror}). {remedy}") from error
    if len(content) > limit:  # it has grown since it was opened
        raise GhostifyError(f"{path}: is larger than {limit / MEGABYTE:g} MB. {remedy}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise GhostifyError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}). {remedy}") from error


def read_json(path: str | Path, *, limit: int = TEXT_LIMIT, folder: Path | None = None, remedy: str = REMEDY) -> Any:
    """The content of a JSON file (see `read_text` and `parse_json`); raises `GhostifyError` naming the path."""
    text = read_text(path, limit=limit, folder=folder, remedy=remedy)
    try:
        return parse_json(text)
    except ValueError as error:
        raise GhostifyError(f"{path}: is truncated or not JSON that can be read ({error}). {remedy}") from error


def parse_json(text: str, *, finite: bool = True) -> Any:
    """The value of a JSON text, at most `DEPTH_LIMIT` levels deep and of at most `VALUE_LIMIT` values.

    Raises `ValueError` for any other text, for a key that an object has twice, for integers of more than `DIGIT_LIMIT`
    digits, for text that is not Unicode, and, if `finite`, for infinite numbers and NaN.
    """
    check_json_size(text)
    parse_float = _finite_float if finite else float
    content = json.loads(
        text, object_pairs_hook=_object, parse_constant=parse_float, parse_float=parse_float, parse_int=_int
    )
    if SURROGATE.search(text):
        json.dumps(content, ensure_ascii=False).encode()  # raises UnicodeEncodeError for half of a pair
    return content


def check_json_size(text: str) -> None:
    """Raise `ValueError` for JSON that is nested too deeply or has too many values; the text is not parsed."""
    without_escapes = text.replace("\\\\", "").replace('\\"', "")
    if without_escapes.count('"') > 4 * VALUE_LIMIT:  # a value has two quotes, and its key two
        raise ValueError(f"more than {VALUE_LIMIT:,} values")
    outside_strings = "".join(without_escapes.split('"')[::2])
    if sum(map(outside_strings.count, "[{,")) > VALUE_LIMIT:
        raise ValueError(f"more than {VALUE_LIMIT:,} values")
    depth = 0
    for bracket in BRACKETS.finditer(outside_strings):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > DEPTH_LIMIT:
            raise ValueError(f"nested more than {DEPTH_LIMIT} levels deep")
        if depth < 0:
            return  # the parser stops here as well


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r:.60} occurs twice")
    return content


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.20} is not finite")
    return value


def _int(text: str) -> int:
    if len(text) > DIGIT_LIMIT:
        raise ValueError(f"the number {text:.20}... has more than {DIGIT_LIMIT} digits")
    return int(text)
