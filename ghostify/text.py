"""Formatting of values as short text."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_TEXT, MAX_VALUE, MAX_INTEGER = 300, 60, 10**30
CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # colours and the like, for terminals


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


def first_line(error: BaseException) -> str:
    """The first line of an error's message as plain text, without a final full stop; its class where it has none."""
    lines = CONTROL_SEQUENCE.sub("", str(error)).splitlines()
    text = next((line.strip() for line in lines if line.strip()), type(error).__name__)
    text = "".join(c if c.isprintable() else " " for c in text)
    return (text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}...").rstrip(".")


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
