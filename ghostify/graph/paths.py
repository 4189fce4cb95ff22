"""Dotted names of modules and what they hold, as seen from the whole model, whose own name is empty."""

from __future__ import annotations


def join_path(path: str, name: str) -> str:
    """What is called `name` in the module at `path`."""
    return f"{path}.{name}" if path else name
