"""Import of objects by name."""

from __future__ import annotations

import importlib
from functools import reduce
from typing import Any


def import_object(name: str) -> Any:
    """The object named "module:attribute", where the attribute may be dotted; raises what the import raises."""
    module, _, attribute = name.partition(":")
    return reduce(getattr, attribute.split("."), importlib.import_module(module))
