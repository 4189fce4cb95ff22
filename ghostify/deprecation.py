"""Former names of public things, which work for one more release and warn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from ghostify.errors import GhostifyError
from ghostify.user_warnings import warn_user

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)

REPORT_FIELDS = {"lines": "layers", "lost": "missing_attributes"}
LAYER_FIELDS = {
    "kind": "conv_class",
    "filters": "weight_shape",
    "output": "output_size",
    "reason": "skip_reason",
    "gather": "reorders_output",
    "error": "fit_error",
    "held_out": "holdout_error",
    "felt": "output_error",
    "makes": "kept_out_count",
    "reads": "kept_in_count",
}
RECONSTRUCTION_FIELDS = {"before": "error_before", "after": "error_after"}


def renamed_keywords(**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function takes the keywords `old=new` by their old names too, with a `DeprecationWarning`.

    The function raises `GhostifyError` where a keyword is passed by both names.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = f"{function.__qualname__.removesuffix('.__init__')}()"

        @functools.wraps(function)
        def with_old_keywords(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(*args, **rename_keys(kwargs, new_names, name))

        return with_old_keywords

    return decorate


def renamed_attributes(new_names: Mapping[str, str]) -> Callable[[C], C]:
    """A decorator: instances of the class have their attributes by the old names too, with a `DeprecationWarning`."""

    def decorate(cls: C) -> C:
        for old, new in new_names.items():
            setattr(cls, old, property(functools.partial(_read_renamed, f"{cls.__name__}.{old}", new)))
        return cls

    return decorate


def _read_renamed(old: str, new: str, instance: Any) -> Any:
    warn_renamed(old, new)
    return getattr(instance, new)


def with_new_keys(item: Mapping[str, Any], new_names: Mapping[str, str]) -> dict[str, Any]:
    """What a file of an earlier version holds, with its old keys under their new names."""
    return {new_names.get(key, key): value for key, value in item.items()}


def rename_keys(table: Mapping[str, Any], new_names: Mapping[str, str], where: str) -> dict[str, Any]:
    """The table with its old keys under their new names; warns for each.

    Raises `GhostifyError` where a key is there under both names.
    """
    renamed = dict(table)
    for old, new in new_names.items():
        if old in renamed:
            if new in renamed:
                raise GhostifyError(f"{where}: {old} is the former name of {new}. Pass {new} only.")
            warn_renamed(f"{where}: {old}", new)
            renamed[new] = renamed.pop(old)
    return renamed


def warn_renamed(old: str, new: str) -> None:
    """Emit a `DeprecationWarning` with the name to use."""
    warn_user(f"{old} is deprecated. Use {new}.", DeprecationWarning)
