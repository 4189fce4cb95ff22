"""Checks of option values, as callbacks of the options: they run as the command line is parsed, before any work.

Each returns the value as it is, and raises `GhostifyError` that names the option.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ghostify.cli.exit_codes import print_notice
from ghostify.cli.parsing import parse_arguments, parse_budget, parse_cheap, parse_settings, parse_size
from ghostify.data.array_files import ARRAY_SUFFIXES, is_array_file
from ghostify.errors import GhostifyError
from ghostify.healing.settings import Healing
from ghostify.planning.policy import Rule
from ghostify.runtimes.registry import EXPORT_FORMATS, RUNTIMES
from ghostify.training.recipe import Recipe

Callback = Callable[[Any], Any]


def _checked(check: Callable[[Any], object]) -> Callback:
    """A callback that runs a check on the value if there is one."""

    def callback(value: Any) -> Any:
        if value is not None:
            check(value)
        return value

    return callback


def deprecated(old: str, new: str) -> Callback:
    """A callback of a hidden flag that prints one line on standard error where the flag is given."""
    return _checked(lambda is_given: print_notice(f"{old} is deprecated. Use {new}.") if is_given else None)


def as_field_of(factory: Callable[..., object], key: str, option: str) -> Callback:
    """A callback that makes an object with this value of a field; its message names the option instead of the field."""

    def check(value: Any) -> None:
        try:
            factory(**{key: value})
        except GhostifyError as error:
            text = str(error).removeprefix("recipe: ").removeprefix("heal: ")
            raise GhostifyError(text.replace(key, option, 1)) from error

    return _checked(check)


def existing_file(option: str) -> Callback:
    """A callback for a file to read."""

    def check(path: Path) -> None:
        _check_exists(path, option)
        if path.is_dir():
            raise GhostifyError(f"{option} {path}: is a folder. Name a file.")

    return _checked(check)


def data_path(option: str, datasets: tuple[str, ...] = ()) -> Callback:
    """A callback for a folder of images or an array file, or the name of a data set."""

    def check(value: str | Path) -> None:
        if str(value) in datasets:
            return
        path = Path(value)
        names = f"{', '.join(datasets)}, " if datasets else ""
        remedy = f"Use {names}a folder of images, or a {' or '.join(ARRAY_SUFFIXES)} file."
        _check_exists(path, option, remedy)
        if not path.is_dir() and not is_array_file(path):
            raise GhostifyError(f"{option} {path}: is neither a folder nor an array file. {remedy}")

    return _checked(check)


def one_of(option: str, names: tuple[str, ...]) -> Callback:
    """A callback for a name out of several."""

    def check(value: str) -> None:
        if value not in names:
            raise GhostifyError(f"{option} {value!r}: is unknown. Use {', '.join(names)}.")

    return _checked(check)


def _check_exists(path: Path, option: str, remedy: str = "Name another.") -> None:
    if not path.exists():
        raise GhostifyError(f"{option} {path}: does not exist. {remedy}")


ratio = as_field_of(Rule, "ratio", "--ratio")
dw_size = as_field_of(Rule, "dw_size", "--dw-size")
cheap = _checked(parse_cheap)
targets = as_field_of(Rule, "targets", "--target")
ignore = as_field_of(Rule, "ignore", "--ignore")
epochs = as_field_of(Recipe, "epochs", "--epochs")
heal = as_field_of(Healing, "seconds", "--heal")
learning_rate = as_field_of(Recipe, "learning_rate", "--lr")
budget = _checked(parse_budget)
arguments = _checked(parse_arguments)
settings = _checked(parse_settings)
size = _checked(parse_size)
runtime = one_of("--runtime", tuple(RUNTIMES))
report_runtime = one_of("--runtime", (*RUNTIMES, "none"))
export_format = one_of("--format", tuple(EXPORT_FORMATS))
