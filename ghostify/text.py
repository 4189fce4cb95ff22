"""Formatting of values as short text."""

from __future__ import annotations

from collections.abc import Iterable


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


def printable(text: object) -> str:
    """The text as it is, or with escapes where it holds control characters."""
    plain = str(text)
    return plain if plain.isprintable() else ascii(plain)[1:-1]
