"""The values of options as data for the library."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from ghostify.cli.exit_codes import print_notice
from ghostify.errors import GhostifyError
from ghostify.planning.policy import Policy, Rule
from ghostify.search.budget import a_budget
from ghostify.training.recipe import Recipe

RULE_OPTIONS = ("ratio", "dw_size", "cheap", "activated", "prune", "former_prune", "target", "ignore")
MAX_DIGITS, MAX_SIDE, MAX_INPUT_VALUES = 6, 2**16, 2**28
SHOWN = 60


def parse_pairs(pairs: Sequence[str], option: str, example: str) -> dict[str, Any]:
    """The `key=value` strings of an option by key; values are parsed as JSON where possible, else kept as text.

    Raises `GhostifyError` for a string of another form, with an `example`, for a key that is given twice, and for
    JSON that is nested without end.
    """
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise GhostifyError(f"{option} {pair!r:.60}: is not of the form key=value. Write it as in {example}.")
        if key in arguments:
            raise GhostifyError(f"{option} {key}: is given twice. Pass it once.")
        try:
            arguments[key] = json.loads(value, parse_constant=_refuse_constant)
        except ValueError:
            arguments[key] = value
        except RecursionError as error:
            raise GhostifyError(f"{option} {key}: is nested too deeply. Write it as in {example}.") from error
    return arguments


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def parse_arguments(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Constructor arguments by name."""
    return parse_pairs(pairs or (), "--arg", "width=32")


def parse_budget(pairs: Sequence[str] | None) -> dict[str, float] | None:
    """Limits by name, or None where there are none."""
    if not pairs:
        return None
    limits: dict[str, float] = dict(a_budget("--budget", parse_pairs(pairs, "--budget", "macs=0.5")))
    return limits


def parse_settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Training settings by name, each of the type that `Recipe` states."""
    settings = parse_pairs(pairs or (), "--set", "features=0.1")
    known = sorted(f.name for f in fields(Recipe))
    for key, value in settings.items():
        if key not in known:
            raise GhostifyError(f"--set {key}: unknown training setting. Use {', '.join(known)}.")
        try:
            Recipe(**{"features": 1.0, key: value})  # a weight of 0 may stand beside another one
        except GhostifyError as error:
            raise GhostifyError(f"--set {str(error).removeprefix('recipe: ')}") from error
    return settings


def parse_recipe(epochs: float, batch: int, learning_rate: float, seed: int, settings: Sequence[str] | None) -> Recipe:
    """The recipe of these values and of further settings `key=value`, which take precedence."""
    given = {"epochs": epochs, "batch": batch, "learning_rate": learning_rate, "seed": seed}
    return Recipe(**{**given, **parse_settings(settings)})


def parse_size(text: str | None) -> tuple[int, int, int] | None:
    """Channels, height and width from "C,H,W"."""
    if text is None:
        return None
    sizes = [size.strip() for size in text.split(",")]
    if len(sizes) != 3 or not all(size.isascii() and size.isdecimal() and size.strip("0") for size in sizes):
        raise GhostifyError(f"--input-size {text!r:.60}: is not three positive sizes. Use C,H,W, such as 3,224,224.")
    channels, height, width = (int(size) if len(size) <= MAX_DIGITS else MAX_INPUT_VALUES for size in sizes)
    if max(channels, height, width) > MAX_SIDE or channels * height * width > MAX_INPUT_VALUES:
        raise GhostifyError(
            f"--input-size {text!r:.60}: is more than {MAX_SIDE} in one direction or {MAX_INPUT_VALUES:,} values. "
            f"Use a smaller size."
        )
    return channels, height, width


def parse_cheap(text: str) -> str | int:
    """The width or the name of the cheap operation."""
    is_width = text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS
    width = int(text) if is_width else text
    try:
        Rule(cheap=width)
    except GhostifyError as error:
        raise GhostifyError(f"--{error}") from error
    return width


def parse_policy(
    file: Path | None,
    ratio: float | None,
    dw_size: int,
    cheap: str,
    activated: bool,
    prune: bool,
    target: Sequence[str] | None,
    ignore: Sequence[str] | None,
    given: Sequence[str] = (),
) -> Policy:
    """The rules of a TOML file, or one rule of the other options, of which `given` are on the command line."""
    if file is not None:
        if given:
            raise GhostifyError(f"{', '.join(given)}: set in the rules of --policy. Pass either, not both.")
        return _read_policy(file)
    rule = Rule(tuple(target or ("*",)), tuple(ignore or ()), ratio, dw_size, parse_cheap(cheap), activated, prune)
    return Policy((rule,), keep_first=not target)


def ratio_of_rule(ratio: float, given: Sequence[str], *, planned: bool) -> float | None:
    """The ratio of the rule that the options form: None where a budget or frontier chooses one for each layer."""
    if planned and "--ratio" in given:
        raise GhostifyError("--ratio: a budget chooses the ratio of each layer. Pass either, not both.")
    return None if planned else ratio


def given_rule_options(context: typer.Context) -> list[str]:
    """The options of the rule that are on the command line."""
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    return [options[name] for name in RULE_OPTIONS if is_given(context, name)]


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and not source.name.startswith("DEFAULT")


def _read_policy(file: Path) -> Policy:
    """The rules of a TOML file; prints a line for each deprecated key."""
    with warnings.catch_warnings(record=True) as deprecations:
        warnings.simplefilter("always", DeprecationWarning)
        policy = Policy.from_toml(file)
    for deprecation in deprecations:
        print_notice(str(deprecation.message))
    return policy
