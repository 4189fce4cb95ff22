"""Facts as short text, the same wherever they are shown."""

from __future__ import annotations

from collections.abc import Iterable


def format_shape(sizes: Iterable[int | str]) -> str:
    """Sizes as in 3x224x224."""
    return "x".join(map(str, sizes))
