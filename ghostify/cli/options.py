"""The options of the `ghostify` command, and the parsing of their values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

from ghostify.cli.console import print_deprecation
from ghostify.data import sources
from ghostify.errors import GhostifyError
from ghostify.planning.policy import Policy, Rule
from ghostify.runtimes.registry import EXPORT_FORMATS, RUNTIMES
from ghostify.search.costs import budget_help
from ghostify.training.trainer import Recipe


def _deprecated(old: str, new: str) -> Callable[[bool], bool]:
    """A callback of a hidden flag that prints one line on standard error where the flag is given."""

    def callback(is_given: bool) -> bool:
        if is_given:
            print_deprecation(f"{old} is deprecated. Use {new}.")
        return is_given

    return callback


Model = Annotated[str, typer.Argument(help="timm:NAME, torchvision:NAME or module.path:callable")]
Folder = Annotated[Path, typer.Argument(help="folder written by `ghostify convert`")]
Ratio = Annotated[
    float, typer.Option(help="output channels per intrinsic map; 2 halves the MACs of each convolution, approximately")
]
DwSize = Annotated[int, typer.Option(help="kernel size of the cheap operation")]
Cheap = Annotated[
    str,
    typer.Option(
        help="cheap operation: depthwise, pointwise, the number of intrinsic maps per ghost, or auto (needs --budget "
        "or plan --frontier): the form with the smaller predicted error"
    ),
]
Activated = Annotated[
    bool, typer.Option("--activated", help="allow depthwise ghosts to read activated maps where the error is smaller")
]
Prune = Annotated[bool, typer.Option("--prune", help="allow the budget to prune channels")]
FormerPrune = Annotated[bool, typer.Option("--narrow", hidden=True, callback=_deprecated("--narrow", "--prune"))]
Targets = Annotated[
    list[str] | None, typer.Option("--target", help="convolutions to rewrite: name, glob, re:PATTERN or class name")
]
Ignore = Annotated[list[str] | None, typer.Option(help="convolutions to skip: name, glob, re:PATTERN or class name")]
PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        help="TOML file of rules; in place of --ratio, --dw-size, --cheap, --activated, --prune; not with --target "
        "or --ignore",
    ),
]
Arguments = Annotated[list[str] | None, typer.Option("--arg", help="constructor argument of the model, key=value")]
Size = Annotated[str | None, typer.Option("--input-size", help="C,H,W of an image; default: the model's own")]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        help=f"limit, in place of the ratio: {budget_help()}. max_drop=0.5 (points of top-1) only with convert and "
        "--validation. Best with --cheap auto."
    ),
]
Runtime = Annotated[str, typer.Option(help=f"runtime to measure latency in: {', '.join(RUNTIMES)}")]
Format = Annotated[str, typer.Option(help=f"export format: {', '.join(EXPORT_FORMATS)}")]
Calibration = Annotated[
    Path | None, typer.Option(help="folder of images, or .npy, .npz, .safetensors; default: none (data-free)")
]
Validation = Annotated[
    Path | None, typer.Option(help="labelled images to measure the drop on, in points of top-1; not the test images")
]
Images = Annotated[int, typer.Option(min=1, help="maximum number of calibration images, sampled evenly")]
Batch = Annotated[int, typer.Option(min=1, help="calibration images per batch")]
Allow = Annotated[
    list[str] | None, typer.Option(help="package that the folder may import classes from, such as your own")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Original = Annotated[Path, typer.Option(help="checkpoint of the original: safetensors, .pt or .pth")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="any other training setting, key=value, such as features=0.1")
]


def parse_policy(
    file: Path | None,
    ratio: float | None,
    dw_size: int,
    cheap: str,
    activated: bool,
    prune: bool,
    target: list[str] | None,
    ignore: list[str] | None,
) -> Policy:
    """The rules of a TOML file, or one rule of the other options."""
    if file is not None:
        if target or ignore:
            raise GhostifyError("--target, --ignore: are set in the rules of --policy. Pass either, not both.")
        return _read_policy(file)
    width: str | int = int(cheap) if cheap.isdigit() else cheap
    rule = Rule(tuple(target or ("*",)), tuple(ignore or ()), ratio, dw_size, width, activated, prune)
    return Policy((rule,), keep_first=not target)


def _read_policy(file: Path) -> Policy:
    """The rules of a TOML file; prints a line for each deprecated key."""
    with warnings.catch_warnings(record=True) as deprecations:
        warnings.simplefilter("always", DeprecationWarning)
        policy = Policy.from_toml(file)
    for deprecation in deprecations:
        print_deprecation(str(deprecation.message))
    return policy


def parse_budget(pairs: list[str] | None) -> dict[str, float] | None:
    """Limits by name, or None where there are none."""
    return sources.parse_arguments(pairs, "--budget", "macs=0.5") if pairs else None


def parse_size(text: str | None) -> tuple[int, int, int] | None:
    """Channels, height and width from "C,H,W"."""
    if text is None:
        return None
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.strip().isdigit() and int(size) > 0 for size in sizes):
        raise GhostifyError(f"--input-size {text!r}: is not three positive sizes. Use C,H,W, such as 3,224,224.")
    channels, height, width = map(int, sizes)
    return channels, height, width


def parse_recipe(epochs: float, batch: int, learning_rate: float, seed: int, settings: list[str] | None) -> Recipe:
    """The recipe of these values and of further settings `key=value`."""
    further = sources.parse_arguments(settings or [], "--set", "features=0.1")
    known = {f.name for f in fields(Recipe)}
    for key in further:
        if key not in known:
            raise GhostifyError(f"--set {key}: unknown training setting. Use {', '.join(sorted(known))}.")
    try:
        return replace(Recipe(epochs=epochs, batch=batch, learning_rate=learning_rate, seed=seed), **further)
    except TypeError as error:
        raise GhostifyError(
            f"--set {' '.join(settings or [])}: has a value of the wrong type ({error}). Write it as in features=0.1."
        ) from error
