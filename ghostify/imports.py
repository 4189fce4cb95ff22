"""Objects by the name under which they are imported."""

from __future__ import annotations

import importlib
from functools import reduce
from typing import Any


def import_object(name: str) -> Any:
    """The object called "module:attribute", of which the attribute may be dotted; raises what importing raises."""
    module, _, attribute = name.partition(":")
    return reduce(getattr, attribute.split("."), importlib.import_module(module))
