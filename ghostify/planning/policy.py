"""The user's rules, in order: plain data, from Python or TOML."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from ghostify.arguments import a_flag, a_function, a_number, a_path, an_integer, call_function
from ghostify.deprecation import rename_keys, renamed_keywords, warn_renamed
from ghostify.errors import GhostifyError
from ghostify.files import MEGABYTE, read_text
from ghostify.modules.layout import NAMED_FORMS, Depthwise, GhostForm, Grouped
from ghostify.text import first_line, format_value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Pattern = str | Callable[[str, nn.Module], bool]
RENAMED_FIELDS = {"narrow": "prune"}
MAX_DW_SIZE = 255
NOT_ODD = f"is not an odd number of at most {MAX_DW_SIZE}"
REMEDY = "Correct the TOML file, or name another."


@dataclass(frozen=True)
class Rule:
    """Convolutions to rewrite, and how. The first rule whose targets match a convolution applies to it.

    `targets` and `ignore` hold exact names, globs, `re:` patterns, class names or callables `(name, module) -> bool`.
    `ratio` is n / m, outputs per intrinsic map; 1 does not change the convolution. `dw_size` is the cheap operation's
    kernel size. `cheap` is "depthwise" (every ghost reads one intrinsic map), "pointwise" (all of them, kernel size 1),
    a number in between, or "auto": with a budget, the form with the smaller predicted error. With `activated`,
    depthwise ghosts may read the intrinsic maps after norm and activation, as in the paper, where the error on holdout
    images is smaller. With `prune`, a budget may also prune channels (see `PruningGroup`). Raises `GhostifyError` for
    other values.
    """

    targets: tuple[Pattern, ...] = ("*",)
    ignore: tuple[Pattern, ...] = ()
    ratio: float = 2.0
    dw_size: int = 3
    cheap: str | int = "depthwise"
    activated: bool = False
    prune: bool = False

    def __post_init__(self) -> None:
        for key, check in RULE_CHECKS.items():
            object.__setattr__(self, key, check(key, getattr(self, key)))

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
    """Ordered rules, or a single one; with `keep_first` the model's first convolution is not changed.

    Raises `GhostifyError` for other values.
    """

    rules: tuple[Rule, ...] = field(default_factory=lambda: (Rule(),))
    keep_first: bool = True

    def __post_init__(self) -> None:
        rules = (self.rules,) if isinstance(self.rules, Rule) else self.rules
        if not isinstance(rules, list | tuple) or not all(isinstance(rule, Rule) for rule in rules):
            shown = format_value(rules) if not isinstance(rules, list | tuple) else "not a list of rules"
            raise GhostifyError(f"policy: its rules are {shown}. Pass a tuple of Rule(...).")
        object.__setattr__(self, "rules", tuple(rules))
        object.__setattr__(self, "keep_first", a_flag("keep_first", self.keep_first))

    @classmethod
    def from_toml(cls, path: str | Path) -> Policy:
        """Read `keep_first = true` and `[[rule]]` tables; raises `GhostifyError` naming the file and the key."""
        path = Path(a_path("path", path))
        text = read_text(path, limit=MEGABYTE, remedy=REMEDY)
        try:
            data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise GhostifyError(f"{path}: is not a readable policy ({first_line(error)}). {REMEDY}") from error
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


def as_policy(_name: str, value: Any) -> Policy:
    """A policy, or the policy of a single rule; a check of arguments."""
    if isinstance(value, Policy):
        return value
    if isinstance(value, Rule):
        return Policy((value,))
    raise GhostifyError(f"policy: is {format_value(value)}. Pass a Policy, such as Policy.from_toml(file), or a Rule.")


def as_patterns(key: str, value: Any) -> tuple[Pattern, ...]:
    """A tuple of patterns from one pattern or several."""
    patterns = tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)
    for pattern in patterns:
        if not isinstance(pattern, str):
            _check_function(key, pattern)
        elif pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise GhostifyError(
                    f"{key} {format_value(pattern)}: is not a regular expression ({first_line(error)}). Correct it."
                ) from error
    return patterns


def _check_function(key: str, pattern: Any) -> None:
    if not callable(pattern) or isinstance(pattern, nn.Module | type):
        raise GhostifyError(
            f"{key} {format_value(pattern)}: is not a pattern. Use names, globs, re: or functions of (name, module)."
        )
    a_function("name", "module")(key, pattern)


def _as_cheap(key: str, value: Any) -> str | int:
    if isinstance(value, str) and value in (*NAMED_FORMS, "auto"):
        return value
    return _as_width(key, value)


def _as_odd(key: str, value: Any) -> int:
    size = _as_size(key, value)
    if size % 2 == 0:
        raise GhostifyError(f"{key} {size}: {NOT_ODD}. Use 1, 3, 5 or 7.")
    return size


_as_size = an_integer(1, MAX_DW_SIZE, problem=NOT_ODD, remedy="Use 1, 3, 5 or 7.")
_as_width = an_integer(
    1,
    problem="is unknown",
    remedy="Use 'depthwise', 'pointwise', 'auto' or the number of intrinsic maps per ghost.",
)
RULE_CHECKS = {
    "targets": as_patterns,
    "ignore": as_patterns,
    "ratio": a_number(1, problem="is not a number of at least 1", remedy="Use 2 for half of the maps."),
    "dw_size": _as_odd,
    "cheap": _as_cheap,
    "activated": a_flag,
    "prune": a_flag,
}


def _matches(pattern: Pattern, name: str, module: nn.Module, kind: str) -> bool:
    if not isinstance(pattern, str):
        return call_function(f"pattern for {name}", lambda: bool(pattern(name, module)))
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern in (name, kind) or fnmatch.fnmatchcase(name, pattern)


def _check_keys(table: Any, keys: set[str], where: str, former: Container[str] = ()) -> None:
    if not isinstance(table, dict):
        raise GhostifyError(f"{where}: is not a table. Correct the TOML file.")
    for key in table:
        if key not in keys and key not in former:
            raise GhostifyError(f"{where}: unknown key {key!r}. Use {', '.join(sorted(keys))}.")
