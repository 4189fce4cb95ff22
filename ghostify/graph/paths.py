"""Dotted paths of modules and tensors, relative to the whole model, whose own path is empty."""

from __future__ import annotations


def join_path(path: str, name: str) -> str:
    """The path of what is called `name` in the module at `path`."""
    return f"{path}.{name}" if path else name
