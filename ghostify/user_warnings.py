"""Warnings that point at the user's line."""

from __future__ import annotations

import inspect
import os
import warnings

PACKAGE = os.path.dirname(__file__) + os.sep


class GhostifyWarning(UserWarning):
    """Something that the user may want to change, but that is not an error."""


def warn_user(message: str, category: type[Warning] = GhostifyWarning) -> None:
    """Emit a warning at the line that called the outermost function of this package."""
    files = [frame.filename for frame in inspect.stack(context=0)]
    depth = max(k for k, file in enumerate(files) if file.startswith(PACKAGE))
    warnings.warn(message, category, stacklevel=depth + 2)
