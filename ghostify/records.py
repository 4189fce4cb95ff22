"""Dataclasses from JSON data, whose values are checked against the annotations of the fields."""

from __future__ import annotations

import types
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ghostify.errors import GhostifyError

Record = TypeVar("Record")


def from_json(cls: type[Record], data: object, where: str) -> Record:
    """An instance of a dataclass from JSON data, with lists in place of tuples and objects in place of dataclasses.

    Raises `GhostifyError` naming the field for a value of another type, for text with control characters, and for
    fields that are missing or unknown.
    """
    if not isinstance(data, dict):
        raise GhostifyError(f"{where}: is not an object")
    hints = _hints(cast(type, cls))
    for key in data.keys() - hints.keys():
        raise GhostifyError(f"{where}: has an unknown field {key[:60]!r}")
    for item in fields(cls):  # type: ignore[arg-type]
        if item.name not in data and item.default is MISSING and item.default_factory is MISSING:
            raise GhostifyError(f"{where}: has no {item.name}")
    return cls(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in data.items()})


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _value(hint: Any, value: Any, where: str) -> Any:
    """The value as the annotation has it; raises `GhostifyError` where it is none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else _value(next(a for a in arguments if a is not type(None)), value, where)
    if is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, where)
    if origin is tuple and isinstance(value, list | tuple):
        hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints) == len(value):
            return tuple(_value(inner, item, where) for inner, item in zip(hints, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {_value(arguments[0], key, where): _value(arguments[1], item, where) for key, item in value.items()}
    if _is_of_type(hint, value):
        return value
    raise GhostifyError(f"{where} has another type than {getattr(hint, '__name__', hint)}")


def _is_of_type(hint: Any, value: Any) -> bool:
    if hint is str:
        return isinstance(value, str) and value.isprintable()
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return hint in (int, bool) and type(value) is hint
