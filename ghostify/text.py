"""Formatting of values as short text."""

from __future__ import annotations

import re
from collections.abc import Iterable

ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
MAX_LINE = 1000


def format_shape(sizes: Iterable[int | str]) -> str:
    """The sizes joined as in 3x224x224."""
    return "x".join(map(str, sizes))


def format_count(count: int | None) -> str:
    """A count with three digits and a unit, as in 1.23 M; empty for None."""
    if count is None:
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def printable(text: str) -> str:
    """The text with control characters, other than line ends, written as escapes, so that a terminal obeys none."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str, limit: int = MAX_LINE) -> str:
    """The text in one line of at most `limit` characters: without colours, spaces in place of line ends."""
    line = printable(" ".join(ESCAPE_SEQUENCE.sub("", text).split()))
    return line if len(line) <= limit else f"{line[: limit // 2]} ... {line[-limit // 2 :]}"
