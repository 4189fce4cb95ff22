"""The `ghostify` command: composes the stages, holds no logic of its own."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ghostify import checkpoint, cost, evaluate, sources
from ghostify.budget import plan_within
from ghostify.convert import ghostify
from ghostify.demo import run as run_demo
from ghostify.errors import GhostifyError
from ghostify.export import export
from ghostify.fit import Progress as FitProgress
from ghostify.frontier import POINTS, Evaluate, Point, curve_table
from ghostify.frontier import frontier as curve_of
from ghostify.measure import paired
from ghostify.plan import plan as make_plan
from ghostify.policy import Policy, Rule
from ghostify.report import Report, notes_of, report, summarise, table
from ghostify.sources import Data, Source
from ghostify.trace import trace

app = typer.Typer(add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Model = Annotated[str, typer.Argument(help="timm:NAME, torchvision:NAME or module.path:callable")]
Ratio = Annotated[float, typer.Option(help="outputs per intrinsic map; 2 halves the dense convolutions")]
DwSize = Annotated[int, typer.Option(help="kernel size of the cheap operation")]
Cheap = Annotated[str, typer.Option(help="depthwise, pointwise, or how many intrinsic maps each ghost sees")]
Activated = Annotated[
    bool, typer.Option("--activated", help="let depthwise ghosts read activated maps where that loses less")
]
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
        help="macs=0.5, params=0.5, latency=0.7 or max_drop=0.5, in place of the ratio; best with --cheap auto"
    ),
]
Runtime = Annotated[str, typer.Option(help="where latency is measured: eager, compile, onnx or openvino")]
Calibration = Annotated[
    Path | None, typer.Option(help="folder of images, or .npy, .npz, .safetensors; absent: data-free")
]
Validation = Annotated[
    Path | None,
    typer.Option(help="labelled images, apart from those of the test: what max_drop is judged on, in top-1 %"),
]
Images = Annotated[int, typer.Option(min=1, help="calibration images to use, spread over what is there")]
Batch = Annotated[int, typer.Option(min=1, help="calibration images at a time")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for machines")]


@app.command()
def plan(
    model: Model,
    ratio: Ratio = 2.0,
    dw_size: DwSize = 3,
    cheap: Cheap = "depthwise",
    activated: Activated = False,
    target: Targets = None,
    ignore: Ignore = None,
    policy: PolicyFile = None,
    budget: Budget = None,
    runtime: Runtime = "eager",
    frontier: Annotated[
        Path | None,
        typer.Option(help="JSON file to write the whole curve to, along the budget's first cost, or MACs"),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="of the frontier")] = POINTS,
    checkpoint_file: Annotated[
        Path | None, typer.Option("--checkpoint", help="trained weights, which budgets and frontiers look at")
    ] = None,
    calibration: Calibration = None,
    validation: Validation = None,
    images: Images = 512,
    batch: Batch = 32,
    arg: Arguments = None,
    input_size: Size = None,
    as_json: AsJson = False,
) -> None:
    """Show what would be done to each convolution; with --frontier, what accuracy costs. Changes no model.

    Example: ghostify plan timm:resnet18 --ratio 2

    Example: ghostify plan timm:resnet18 --checkpoint w.safetensors --calibration photos/ --cheap auto --frontier f.json
    """
    built = Source(model, sources.parse_arguments(arg or [])).build()
    if checkpoint_file is not None:
        checkpoint.load_weights(built, checkpoint_file)
    prepared = sources.preprocessing(built, _size(input_size))
    program = trace(built, sources.example(prepared.size))
    wished, limits = _policy(policy, ratio, dw_size, cheap, activated, target, ignore), _budget(budget)
    data = None if calibration is None else sources.read_data(calibration, prepared, limit=images, batch=batch).batches
    title = f"{model} at {'x'.join(map(str, prepared.size))}"
    if frontier is not None:
        judged = None if validation is None else _judge(validation, prepared, batch)
        key = next(iter(limits or {"macs": 1.0}))
        curve = curve_of(program, wished, key, data, evaluate=judged, runtime=runtime, points=points)
        _keep_curve(curve, frontier, title, as_json)
        return
    decided = make_plan(program, wished) if limits is None else plan_within(program, wished, limits, data, 0, runtime)
    _print(summarise(decided), title, as_json)


@app.command()
def convert(
    model: Model,
    output: Annotated[Path, typer.Option(help="folder to write")],
    checkpoint_file: Annotated[
        Path, typer.Option("--checkpoint", help="the trained weights: safetensors, .pt or .pth")
    ],
    ratio: Ratio = 2.0,
    dw_size: DwSize = 3,
    cheap: Cheap = "depthwise",
    activated: Activated = False,
    target: Targets = None,
    ignore: Ignore = None,
    policy: PolicyFile = None,
    budget: Budget = None,
    runtime: Runtime = "eager",
    calibration: Calibration = None,
    validation: Validation = None,
    images: Images = 512,
    batch: Batch = 32,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="then gradient steps block by block, on the calibration images")
    ] = False,
    arg: Arguments = None,
    input_size: Size = None,
    seed: Annotated[int, typer.Option(help="for the positions that the fit looks at")] = 0,
    as_json: AsJson = False,
) -> None:
    """Convert a saved checkpoint and save the result as a folder.

    Example: ghostify convert timm:resnet18 --checkpoint w.safetensors --calibration photos/ --output out/
    """
    source = Source(model, sources.parse_arguments(arg or []))
    wished = _policy(policy, ratio, dw_size, cheap, activated, target, ignore)
    built = checkpoint.load_weights(source.build(), checkpoint_file)
    prepared = sources.preprocessing(built, _size(input_size))
    data = None if calibration is None else sources.read_data(calibration, prepared, limit=images, batch=batch)
    with _progress("fitting", as_json) as progress:
        made = ghostify(
            built,
            policy=wished,
            budget=_budget(budget),
            example_inputs=sources.example(prepared.size),
            calibration=None if data is None else data.batches,
            evaluate=None if validation is None else _judge(validation, prepared, batch),
            runtime=runtime,
            reconstruct=reconstruct,
            seed=seed,
            progress=progress,
        )
    checkpoint.save(made, output, source={**source.to_dict(), "input_size": list(prepared.size)})
    found = report(made)
    fitted = "data-free" if data is None else f"fitted to {found.images} images in {found.effort}"
    _print(found, f"{model} -> {output}, {fitted}", as_json)


@app.command(name="eval")
def evaluate_command(
    folder: Annotated[Path, typer.Argument(help="a folder that `ghostify convert` wrote")],
    data: Annotated[Path, typer.Option(help="images in class folders, or an array file with images and labels")],
    original: Annotated[
        Path | None, typer.Option(help="the original's checkpoint, to compare answers, errors and speed with")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="use at most so many, spread over what is there")] = None,
    batch: Annotated[int, typer.Option(min=1, help="images at a time")] = 32,
    as_json: AsJson = False,
) -> None:
    """Accuracy of a converted model, MACs, parameters, and how it compares with the original.

    Example: ghostify eval out/ --data test.npz --original w.safetensors
    """
    module = checkpoint.load(folder)
    source = notes_of(module)["ghostify_source"]
    if not source:
        raise GhostifyError(f"{folder}: does not say which model it was: convert it by the command to use eval")
    built = Source(source["name"], source["arguments"]).build()
    prepared = sources.preprocessing(built, tuple(source["input_size"]))
    read = sources.read_data(data, prepared, limit=images, batch=batch)
    if original is not None:
        checkpoint.load_weights(built, original)
    facts = _compare(module, built if original is not None else None, read)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    console = Console()
    for key, value in facts.items():
        console.print(f"{key:48} {value}", highlight=False)


@app.command(name="export")
def export_command(
    folder: Annotated[Path, typer.Argument(help="a folder that `ghostify convert` wrote")],
    format: Annotated[str, typer.Option(help="onnx, openvino, or pt2 (torch.export's file)")] = "onnx",
    output: Annotated[Path | None, typer.Option(help="folder to write; absent: the same")] = None,
    input_size: Size = None,
) -> None:
    """Write the inference form of a converted model for another runtime, and compare its answers there.

    Example: ghostify export out/ --format onnx
    """
    module = checkpoint.load(folder)
    source = notes_of(module)["ghostify_source"] or {}
    size = _size(input_size) or tuple(source.get("input_size", ()))
    if not size:
        raise GhostifyError(f"{folder}: does not say how large its images are: pass --input-size C,H,W")
    file = export(module, output or folder, format=format, example_inputs=sources.example(size))
    Console().print(
        f"{file}: {file.stat().st_size / 1e6:.1f} MB, any batch of {'x'.join(map(str, size))}", highlight=False
    )


def _compare(module: Any, original: Any, read: Data) -> dict[str, Any]:
    answers = evaluate.outputs(module, read.batches)
    first = read.batches[0][:1]
    facts: dict[str, Any] = {
        "images": read.images,
        "MACs an image": cost.count_macs(module, first),
        "parameters": cost.parameters(module),
    }
    if read.labels is not None:
        facts["top-1 %"] = round(evaluate.top1(answers, read.labels), 2)
    if original is None:
        return facts
    reference = evaluate.outputs(original, read.batches)
    facts["original's MACs an image"] = cost.count_macs(original, first)
    facts["original's parameters"] = cost.parameters(original)
    if read.labels is not None:
        facts["original's top-1 %"] = round(evaluate.top1(reference, read.labels), 2)
    facts["same answers as the original %"] = round(evaluate.top1(answers, reference.argmax(1)), 2)
    facts["relative output error"] = round(evaluate.relative_error(answers, reference), 5)
    before, after = paired([original, module], first)
    facts["times as fast, both deployed, eager, batch 1"] = round(before / after, 2)
    return facts


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option(help="keep the checkpoint and the converted model here")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a small network on images that are on this machine, convert it, and show what is left of its accuracy.

    Example: ghostify demo
    """
    run_demo(output, Console(stderr=as_json), as_json)


def main() -> None:
    """Entry point: user errors are one line and exit code 2."""
    try:
        app(standalone_mode=True)
    except GhostifyError as error:
        print(f"ghostify: {error}", file=sys.stderr)
        sys.exit(2)


def _policy(
    file: Path | None,
    ratio: float,
    dw_size: int,
    cheap: str,
    activated: bool,
    target: list[str] | None,
    ignore: list[str] | None,
) -> Policy:
    if file is not None:
        if target or ignore:
            raise GhostifyError("--target and --ignore belong into the rules of --policy: give either, not both")
        return Policy.from_toml(file)
    width: str | int = int(cheap) if cheap.isdigit() else cheap
    rule = Rule(tuple(target or ("*",)), tuple(ignore or ()), ratio, dw_size, width, activated)
    return Policy((rule,), keep_first=not target)


def _budget(pairs: list[str] | None) -> dict[str, float] | None:
    return sources.parse_arguments(pairs) if pairs else None


def _size(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise GhostifyError(f"--input-size {text!r} is not C,H,W, such as 3,224,224")
    return (int(parts[0]), int(parts[1]), int(parts[2]))


@contextlib.contextmanager
def _progress(what: str, quiet: bool) -> Iterator[FitProgress | None]:
    if quiet:
        yield None
        return
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name)


def _judge(path: Path, prepared: sources.Preprocessing, batch: int) -> Evaluate:
    """Top-1 on labelled images, in percent."""
    read = sources.read_data(path, prepared, batch=batch)
    labels = read.labels
    if labels is None:
        raise GhostifyError(f"{path}: has no labels to judge by: use class folders, or 'labels' in the file")
    return lambda model: evaluate.top1(evaluate.outputs(model, read.batches), labels)


def _keep_curve(curve: list[Point], file: Path, title: str, as_json: bool) -> None:
    text = json.dumps([point.to_dict() for point in curve], indent=1)
    try:
        file.write_text(text + "\n")
    except OSError as error:
        raise GhostifyError(f"{file}: cannot be written: {error.strerror}") from error
    if as_json:
        print(text)
    else:
        Console().print(curve_table(curve, title))


def _print(found: Report, title: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
        return
    console = Console()
    console.print(table(found, title))
    skipped = len(found.lines) - found.rewritten
    console.print(f"{found.rewritten} convolutions rewritten, {skipped} left as they are", highlight=False)
    if found.lost:
        console.print(f"without the original's {', '.join(found.lost)}", highlight=False)
    if (done := found.reconstruction) is not None:
        kept = sum(b.steps > 0 for b in done.blocks)
        errors = f"outputs' error on held-out images {done.before:.4f} -> {done.after:.4f}"
        console.print(f"{kept} of {len(done.blocks)} blocks reconstructed, {errors}", highlight=False)
