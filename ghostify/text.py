"""Formatting of values as short text."""

from __future__ import annotations

from collections.abc import Iterable


def format_shape(sizes: Iterable[int | str]) -> str:
    """The sizes joined as in 3x224x224."""
    return "x".join(map(str, sizes))
