"""What may be typed after a verb of the `ghostify` command, and what it means."""

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
from ghostify.training.trainer import Recipe


def _deprecated(old: str, new: str) -> Callable[[bool], bool]:
    """A callback of a hidden flag that prints one line on standard error where the flag is given."""

    def callback(is_given: bool) -> bool:
        if is_given:
            print_deprecation(f"{old} is deprecated. Use {new}.")
        return is_given

    return callback


Model = Annotated[str, typer.Argument(help="timm:NAME, torchvision:NAME or module.path:callable")]
Ratio = Annotated[float, typer.Option(help="outputs per intrinsic map; 2 halves the dense convolutions")]
DwSize = Annotated[int, typer.Option(help="kernel size of the cheap operation")]
Cheap = Annotated[
    str,
    typer.Option(
        help="depthwise, pointwise, how many intrinsic maps each ghost sees, or auto: what loses less (with a budget)"
    ),
]
Activated = Annotated[
    bool, typer.Option("--activated", help="let depthwise ghosts read activated maps where that loses less")
]
Prune = Annotated[bool, typer.Option("--prune", help="allow the budget to prune channels")]
Narrow = Annotated[bool, typer.Option("--narrow", hidden=True, callback=_deprecated("--narrow", "--prune"))]
Targets = Annotated[list[str] | None, typer.Option("--target", help="convolutions to rewrite: name, glob, re:, class")]
Ignore = Annotated[list[str] | None, typer.Option(help="convolutions to leave alone: name, glob, re:, class")]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", help="a TOML file of rules, in place of the options above")
]
Arguments = Annotated[list[str] | None, typer.Option("--arg", help="constructor argument, key=value")]
Size = Annotated[str | None, typer.Option("--input-size", help="C,H,W, where the model does not say")]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        help="macs=0.5, params=0.5 or latency=0.7 (shares of the original's; above 1, numbers, of milliseconds) or "
        "max_drop=0.5, in place of the ratio; best with --cheap auto"
    ),
]
Runtime = Annotated[str, typer.Option(help=f"runtime that latency is measured in: {', '.join(RUNTIMES)}")]
Format = Annotated[str, typer.Option(help=f"export format: {', '.join(EXPORT_FORMATS)}")]
Calibration = Annotated[
    Path | None, typer.Option(help="folder of images, or .npy, .npz, .safetensors; absent: data-free")
]
Validation = Annotated[
    Path | None,
    typer.Option(help="labelled images, apart from those of the test: what max_drop is judged on, in top-1 %"),
]
Images = Annotated[int, typer.Option(min=1, help="calibration images to use, spread over what is there")]
Batch = Annotated[int, typer.Option(min=1, help="calibration images at a time")]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="a package of your own from which the folder may import: where a forward does not trace"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for machines")]


Original = Annotated[Path, typer.Option(help="the original's checkpoint: safetensors, .pt or .pth")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="any other entry of the recipe, key=value, such as features=0.1")
]


def parse_policy(
    file: Path | None,
    ratio: float,
    dw_size: int,
    cheap: str,
    activated: bool,
    prune: bool,
    target: list[str] | None,
    ignore: list[str] | None,
) -> Policy:
    """The rules of a file, or the one rule that the other options make up."""
    if file is not None:
        if target or ignore:
            raise GhostifyError("--target and --ignore belong into the rules of --policy: give either, not both")
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
    """Limits by name."""
    return sources.parse_arguments(pairs) if pairs else None


def parse_size(text: str | None) -> tuple[int, int, int] | None:
    """Channels, height, width."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise GhostifyError(f"--input-size {text!r} is not C,H,W, such as 3,224,224")
    return (int(parts[0]), int(parts[1]), int(parts[2]))


def parse_recipe(epochs: float, batch: int, learning_rate: float, seed: int, others: list[str] | None) -> Recipe:
    """A recipe of these and other entries."""
    given = sources.parse_arguments(others or [])
    known = {f.name for f in fields(Recipe)}
    for key in given:
        if key not in known:
            raise GhostifyError(f"--set {key}: a recipe has no such entry: it has {', '.join(sorted(known))}")
    try:
        return replace(Recipe(epochs=epochs, batch=batch, learning_rate=learning_rate, seed=seed), **given)
    except TypeError as error:
        raise GhostifyError(f"--set {' '.join(others or [])}: {error}") from error
