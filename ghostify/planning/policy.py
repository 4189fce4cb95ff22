"""The user's rules, in order: plain data, from Python or TOML."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from ghostify.deprecation import rename_keys, renamed_keywords, warn_renamed
from ghostify.errors import GhostifyError
from ghostify.modules.layout import NAMED_FORMS, Depthwise, GhostForm, Grouped

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Pattern = str | Callable[[str, nn.Module], bool]
RENAMED_FIELDS = {"narrow": "prune"}
DEFAULT_RATIO = 2.0


@dataclass(frozen=True)
class Rule:
    """Convolutions to rewrite, and how. The first rule whose targets match a convolution applies to it.

    `targets` and `ignore` hold exact names, globs, `re:` patterns, class names or callables `(name, module) -> bool`.
    `ratio` is n / m, outputs per intrinsic map; 1 does not change the convolution. Without a budget it is 2 by default
    (`DEFAULT_RATIO`). With one, None leaves it to the budget, and a number holds for these layers: the rest is planned
    around them. `dw_size` is the cheap operation's
    kernel size. `cheap` is "depthwise" (every ghost reads one intrinsic map), "pointwise" (all of them, kernel size 1),
    a number in between, or "auto": with a budget, the form with the smaller predicted error. With `activated`,
    depthwise ghosts may read the intrinsic maps after norm and activation, as in the paper, where the error on holdout
    images is smaller. With `prune`, a budget may also prune channels (see `PruningGroup`). Raises `GhostifyError` for
    other values.
    """

    targets: tuple[Pattern, ...] = ("*",)
    ignore: tuple[Pattern, ...] = ()
    ratio: float | None = None
    dw_size: int = 3
    cheap: str | int = "depthwise"
    activated: bool = False
    prune: bool = False

    def __post_init__(self) -> None:
        for key in ("targets", "ignore"):
            object.__setattr__(self, key, as_patterns(getattr(self, key), key))
        if self.ratio is not None and (
            isinstance(self.ratio, bool)
            or not isinstance(self.ratio, int | float)
            or not 1 <= self.ratio < float("inf")
        ):
            raise GhostifyError(f"ratio {self.ratio!r}: is not a number of at least 1. Use 2 for half of the maps.")
        if (
            isinstance(self.dw_size, bool)
            or not isinstance(self.dw_size, int)
            or self.dw_size < 1
            or self.dw_size % 2 == 0
        ):
            raise GhostifyError(f"dw_size {self.dw_size!r}: is not an odd number. Use 1, 3, 5 or 7.")
        is_width = isinstance(self.cheap, int) and not isinstance(self.cheap, bool) and self.cheap >= 1
        if not is_width and self.cheap not in (*NAMED_FORMS, "auto"):
            raise GhostifyError(
                f"cheap {self.cheap!r}: is unknown. Use 'depthwise', 'pointwise', 'auto' or the number of intrinsic "
                f"maps per ghost."
            )
        for key in ("activated", "prune"):
            if not isinstance(getattr(self, key), bool):
                raise GhostifyError(f"{key} {getattr(self, key)!r}: is not a boolean. Use true or false.")

    @property
    def forms(self) -> tuple[type[GhostForm], ...]:
        """The forms of ghosts that `cheap` allows."""
        match self.cheap:
            case "auto":
                return tuple(NAMED_FORMS.values())
            case str(name):
                return (NAMED_FORMS[name],)
            case width:
                return (Depthwise,) if width == 1 else (Grouped,)

    @property
    def ratio_or_default(self) -> float:
        """The ratio without a budget."""
        return DEFAULT_RATIO if self.ratio is None else self.ratio

    @property
    def narrow(self) -> bool:
        """The former name of `prune`."""
        warn_renamed("Rule.narrow", "prune")
        return self.prune

    def matches(self, name: str, module: nn.Module, kind: str) -> bool:
        """Whether the rule targets the convolution."""
        return any(_matches(p, name, module, kind) for p in self.targets)

    def ignores(self, name: str, module: nn.Module, kind: str) -> bool:
        """Whether the rule ignores the convolution."""
        return any(_matches(p, name, module, kind) for p in self.ignore)


Rule.__init__ = renamed_keywords(**RENAMED_FIELDS)(Rule.__init__)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Policy:
    """Ordered rules; with `keep_first` the model's first convolution is not changed."""

    rules: tuple[Rule, ...] = field(default_factory=lambda: (Rule(),))
    keep_first: bool = True

    @classmethod
    def from_toml(cls, path: str | Path) -> Policy:
        """Read `keep_first = true` and `[[rule]]` tables; raises `GhostifyError` naming the file and the key."""
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise GhostifyError(
                f"{path}: is not a readable policy ({error}). Correct the TOML file, or name another."
            ) from error
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "policy") -> Policy:
        """The policy that a parsed TOML document holds."""
        _check_keys(data, {"rule", "keep_first"}, where)
        tables = data.get("rule", [])
        if not isinstance(tables, list) or not tables:
            raise GhostifyError(f"{where}: has no [[rule]] table. Write at least one, with targets and ratio.")
        if not isinstance(data.get("keep_first", True), bool):
            raise GhostifyError(f"{where}: keep_first is not a boolean. Use true or false.")
        rules = []
        for number, table in enumerate(tables, 1):
            _check_keys(table, {f.name for f in fields(Rule)}, f"{where}: rule {number}", former=RENAMED_FIELDS)
            table = rename_keys(table, RENAMED_FIELDS, f"{where}: rule {number}")
            try:
                rules.append(Rule(**table))
            except GhostifyError as error:
                raise GhostifyError(f"{where}: rule {number}: {error}") from error
        return cls(tuple(rules), data.get("keep_first", True))


def as_patterns(value: Any, key: str) -> tuple[Pattern, ...]:
    """A tuple of patterns from one pattern or several."""
    patterns = (value,) if isinstance(value, str) or callable(value) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) or callable(p) for p in patterns):
        raise GhostifyError(f"{key} {value!r}: is not a pattern. Use a name, a glob, re:, a callable, or a list.")
    for pattern in patterns:
        if isinstance(pattern, str) and pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise GhostifyError(f"{key} {pattern!r}: is not a regular expression ({error}). Correct it.") from error
    return tuple(patterns)


def _matches(pattern: Pattern, name: str, module: nn.Module, kind: str) -> bool:
    if not isinstance(pattern, str):
        return bool(pattern(name, module))
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern in (name, kind) or fnmatch.fnmatchcase(name, pattern)


def _check_keys(table: Any, keys: set[str], where: str, former: Container[str] = ()) -> None:
    if not isinstance(table, dict):
        raise GhostifyError(f"{where}: is not a table. Correct the TOML file.")
    for key in table:
        if key not in keys and key not in former:
            raise GhostifyError(f"{where}: unknown key {key!r}. Use {', '.join(sorted(keys))}.")
