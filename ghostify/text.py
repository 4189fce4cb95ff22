"""Formatting of values as short text."""

from __future__ import annotations

import re
from collections.abc import Iterable

ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
MAX_LINE, MAX_REASON, MAX_VALUE, MAX_INTEGER = 1000, 300, 60, 10**30


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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop; the error's class where it has none."""
    return one_line(str(error).strip().partition("\n")[0], MAX_REASON).rstrip(".") or type(error).__name__


def format_value(value: object) -> str:
    """A value in an error message: short text and numbers as they are, anything else by its class."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, int) and abs(value) >= MAX_INTEGER:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."
    return f"of class {type(value).__name__}"
