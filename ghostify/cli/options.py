"""The options of the `ghostify` command; each value is checked as it is parsed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ghostify.cli import checks
from ghostify.runtimes.registry import EXPORT_FORMATS, RUNTIMES
from ghostify.search.costs import budget_help
from ghostify.training.recipe import MAX_COUNT

Model = Annotated[str, typer.Argument(help="timm:NAME, torchvision:NAME or module.path:callable")]
Folder = Annotated[Path, typer.Argument(help="folder written by `ghostify convert`")]
Ratio = Annotated[
    float,
    typer.Option(
        callback=checks.ratio,
        help="output channels per intrinsic map; 2 halves the MACs of each convolution, approximately",
    ),
]
DwSize = Annotated[int, typer.Option(callback=checks.dw_size, help="kernel size of the cheap operation")]
Cheap = Annotated[
    str,
    typer.Option(
        callback=checks.cheap,
        help="cheap operation: depthwise, pointwise, the number of intrinsic maps per ghost, or auto (needs --budget "
        "or plan --frontier): the form with the smaller predicted error",
    ),
]
Activated = Annotated[
    bool, typer.Option("--activated", help="allow depthwise ghosts to read activated maps where the error is smaller")
]
Prune = Annotated[bool, typer.Option("--prune", help="allow the budget to prune channels")]
FormerPrune = Annotated[bool, typer.Option("--narrow", hidden=True, callback=checks.deprecated("--narrow", "--prune"))]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", callback=checks.targets, help="convolutions to rewrite: name, glob, re:PATTERN or class name"
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(callback=checks.ignore, help="convolutions to skip: name, glob, re:PATTERN or class name"),
]
PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        callback=checks.existing_file("--policy"),
        help="TOML file of rules; in place of --ratio, --dw-size, --cheap, --activated, --prune; not with --target "
        "or --ignore",
    ),
]
Arguments = Annotated[
    list[str] | None,
    typer.Option("--arg", callback=checks.arguments, help="constructor argument of the model, key=value"),
]
Size = Annotated[
    str | None, typer.Option("--input-size", callback=checks.size, help="C,H,W of an image; default: the model's own")
]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        callback=checks.budget,
        help=f"limit, in place of the ratio: {budget_help()}. max_drop=0.5 (points of top-1) only with convert and "
        "--validation. Best with --cheap auto.",
    ),
]
Runtime = Annotated[
    str, typer.Option(callback=checks.runtime, help=f"runtime to measure latency in: {', '.join(RUNTIMES)}")
]
Format = Annotated[str, typer.Option(callback=checks.export_format, help=f"export format: {', '.join(EXPORT_FORMATS)}")]
FreeBatch = Annotated[
    bool | None,
    typer.Option(
        "--dynamic/--fixed-batch", help="whether the file must take any batch size; default: where the model permits it"
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        callback=checks.data_path("--calibration"),
        help="folder of images, or .npy, .npz, .safetensors; default: none (data-free)",
    ),
]
Validation = Annotated[
    Path | None,
    typer.Option(
        callback=checks.data_path("--validation"),
        help="labelled images to measure the drop on, in points of top-1; not the test images",
    ),
]
Images = Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="maximum number of calibration images, sampled evenly")]
Batch = Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="calibration images per batch")]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        help="class or function that the folder may use, package.module:Name, or package.module for all that it defines"
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="write beside files that ghostify did not write: they stay, only ghostify's own files are replaced; a "
        "single file is replaced",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Original = Annotated[
    Path,
    typer.Option(
        callback=checks.existing_file("--original"), help="checkpoint of the original: safetensors, .pt or .pth"
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", callback=checks.settings, help="any other training setting, key=value, such as features=0.1"),
]
