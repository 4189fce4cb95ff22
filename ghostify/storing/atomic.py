"""Text files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write a file beside its place, then put it there in one step."""
    fresh = file.with_name(f".{file.name}-{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(file)
