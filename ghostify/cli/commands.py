"""The `ghostify` command: composes the stages, holds no logic of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ghostify import __version__
from ghostify.api import ghostify
from ghostify.cli.console import print_line, progress, show_facts, show_report
from ghostify.cli.demo import run_demo as run_demo
from ghostify.cli.doctor import collect_facts as doctor_findings
from ghostify.cli.options import (
    Activated,
    Allow,
    Arguments,
    AsJson,
    Batch,
    Budget,
    Calibration,
    Cheap,
    DwSize,
    Format,
    Ignore,
    Images,
    Model,
    Original,
    PolicyFile,
    Prune,
    Ratio,
    Runtime,
    Settings,
    Size,
    Targets,
    Validation,
    parse_budget,
    parse_policy,
    parse_recipe,
    parse_size,
)
from ghostify.data import sources
from ghostify.data.sources import ImageData, ModelSource
from ghostify.data.training_data import load_training_data
from ghostify.deployment.exporter import export
from ghostify.errors import GhostifyError
from ghostify.evaluation.comparison import compare_models
from ghostify.evaluation.metrics import predict, top1
from ghostify.fitting.distributed import rank_and_world_size
from ghostify.graph.tracing import trace
from ghostify.io import checkpoint
from ghostify.planning import cost
from ghostify.planning.planner import plan as make_plan
from ghostify.reporting.builder import write_report
from ghostify.reporting.redundancy import study_layer, study_table, write_pictures
from ghostify.runtimes.registry import RUNTIMES
from ghostify.search.budget import plan_for_budget
from ghostify.search.pareto import POINTS, Evaluate, frontier_table, read_frontier, write_frontier
from ghostify.search.pareto import frontier as curve_of
from ghostify.summary import build_report, conversion_info, report
from ghostify.text import format_shape
from ghostify.timing.latency import interleaved_latency
from ghostify.training.run_folder import metrics_of
from ghostify.training.trainer import finetune as tune

app = typer.Typer(add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """Rewrite the convolutions of a trained network into cheaper ones, and look at the result."""
    if version:
        print(f"ghostify {__version__}")
        raise typer.Exit


@app.command()
def plan(
    model: Model,
    ratio: Ratio = 2.0,
    dw_size: DwSize = 3,
    cheap: Cheap = "depthwise",
    activated: Activated = False,
    narrow: Prune = False,
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

    Example: ghostify plan timm:resnet18 --checkpoint resnet18.safetensors --calibration photos/ --cheap auto
    --frontier curve.json
    """
    built, prepared = _build_model(_source(model, arg), checkpoint_file, parse_size(input_size))
    program = trace(built, sources.blank_input(prepared.size))
    wished, limits = (
        parse_policy(policy, ratio, dw_size, cheap, activated, narrow, target, ignore),
        parse_budget(budget),
    )
    data = None if calibration is None else sources.read_data(calibration, prepared, limit=images, batch=batch).batches
    title = f"{model} at {format_shape(prepared.size)}"
    if frontier is not None:
        judged = None if validation is None else _top1_evaluator(validation, prepared, batch)
        key = next(iter(limits or {"macs": 1.0}))
        curve = curve_of(program, wished, key, data, evaluate=judged, runtime=runtime, points=points)
        write_frontier(curve, frontier)
        if as_json:
            print(frontier.read_text(), end="")
        else:
            Console().print(frontier_table(curve, title))
        return
    decided = (
        make_plan(program, wished) if limits is None else plan_for_budget(program, wished, limits, data, 0, runtime)
    )
    show_report(build_report(decided), title, as_json)


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
    narrow: Prune = False,
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

    Example: ghostify convert timm:resnet18 --checkpoint resnet18.safetensors --calibration photos/ --cheap auto
    --budget macs=0.5 --output out/
    """
    source = _source(model, arg)
    wished = parse_policy(policy, ratio, dw_size, cheap, activated, narrow, target, ignore)
    built, prepared = _build_model(source, checkpoint_file, parse_size(input_size))
    data = None if calibration is None else sources.read_data(calibration, prepared, limit=images, batch=batch)
    with progress("fitting", as_json) as told:
        made = ghostify(
            built,
            policy=wished,
            budget=parse_budget(budget),
            example_inputs=sources.blank_input(prepared.size),
            calibration=None if data is None else data.batches,
            evaluate=None if validation is None else _top1_evaluator(validation, prepared, batch),
            runtime=runtime,
            reconstruct=reconstruct,
            seed=seed,
            progress=told,
        )
    checkpoint.save(made, output, source={**source.to_dict(), "input_size": list(prepared.size)})
    found = report(made)
    fitted = "data-free" if data is None else f"fitted to {found.images} images in {found.fit_time}"
    show_report(found, f"{model} -> {output}, {fitted}", as_json)


@app.command(name="eval")
def evaluate_command(
    folder: Annotated[Path, typer.Argument(help="a folder that `ghostify convert` wrote")],
    data: Annotated[Path, typer.Option(help="images in class folders, or an array file with images and labels")],
    original: Annotated[
        Path | None, typer.Option(help="the original's checkpoint, to compare answers, errors and speed with")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="use at most so many, spread over what is there")] = None,
    batch: Annotated[int, typer.Option(min=1, help="images at a time")] = 32,
    allow: Allow = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy of a converted model, MACs, parameters, and how it compares with the original.

    Example: ghostify eval out/ --data test/ --original resnet18.safetensors
    """
    module, built, prepared, _ = _load_pair(folder, original, allow)
    read = sources.read_data(data, prepared, limit=images, batch=batch)
    show_facts(_eval_facts(module, None if original is None else built, read), as_json)


@app.command()
def finetune(
    folder: Annotated[Path, typer.Argument(help="a folder that `ghostify convert` wrote")],
    data: Annotated[
        str,
        typer.Option(help="fashion-mnist, cifar10, images, class folders, train/ and val/ with such, or an array file"),
    ],
    original: Original,
    output: Annotated[Path, typer.Option(help="folder to write; the state of training is kept beside it")],
    epochs: Annotated[float, typer.Option(help="rounds through the training images")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="images a step, of all processes together")] = 128,
    learning_rate: Annotated[float, typer.Option("--lr", help="the highest")] = 0.02,
    seed: Annotated[int, typer.Option(help="for order and augmentation")] = 0,
    settings: Settings = None,
    allow: Allow = None,
    as_json: AsJson = False,
) -> None:
    """Train a converted model towards the original's answers; called again after an interruption, it goes on.

    Example: ghostify finetune out/ --data photos/ --original resnet18.safetensors --batch 8 --output tuned/

    In several processes: accelerate launch -m ghostify finetune ...
    """
    recipe = parse_recipe(epochs, batch, learning_rate, seed, settings)
    module, built, prepared, source = _load_pair(folder, original, allow)
    taught = load_training_data(data, prepared, seed)
    training = output.with_name(f"{output.name}.training")
    with progress("training", as_json) as told:
        tuned = tune(module, built, taught, training, recipe, on_progress=told)
    if rank_and_world_size()[0]:
        return
    checkpoint.save(tuned, output, source=source)
    judged = [line for line in metrics_of(training) if "validation" in line]
    if as_json:
        print(json.dumps({"output": str(output), "evaluations": judged}, indent=1))
        return
    for line in judged:
        said = "top-1" if taught.labelled else "same answers as the original"
        print_line(f"step {line['step']}: {said} {line['validation']:.2f} % of validation images")
    print_line(f"{output}: the best of these; metrics in {training}")


@app.command(name="export")
def export_command(
    folder: Annotated[Path, typer.Argument(help="a folder that `ghostify convert` wrote")],
    format: Format = "onnx",
    output: Annotated[Path | None, typer.Option(help="folder to write; absent: the same")] = None,
    input_size: Size = None,
    allow: Allow = None,
) -> None:
    """Write the inference form of a converted model for another runtime, and compare its answers there.

    Example: ghostify export out/ --format onnx
    """
    module = checkpoint.load(folder, allow=allow or ())
    source = conversion_info(module).source or {}
    size = parse_size(input_size) or tuple(source.get("input_size", ()))
    if not size:
        raise GhostifyError(f"{folder}: does not say how large its images are: pass --input-size C,H,W")
    file = export(module, output or folder, format=format, example_inputs=sources.blank_input(size))
    print_line(f"{file}: {file.stat().st_size / 1e6:.1f} MB, any batch of {format_shape(size)}")


def _source(model: str, arg: list[str] | None) -> ModelSource:
    return ModelSource(model, sources.parse_arguments(arg or []))


def _build_model(source: ModelSource, weights: Path | None, size: Any) -> tuple[Any, sources.Preprocessing]:
    """A model, with a checkpoint's weights if one is given, and how images become its inputs."""
    built = source.build()
    if weights is not None:
        checkpoint.load_weights(built, weights)
    return built, sources.preprocessing(built, size)


def _load_pair(
    folder: Path, original: Path | None, allow: list[str] | None
) -> tuple[Any, Any, sources.Preprocessing, dict[str, Any]]:
    """A converted model, its original with that checkpoint's weights, how images become inputs, and whence it came."""
    module = checkpoint.load(folder, allow=allow or ())
    source = conversion_info(module).source
    if not source:
        raise GhostifyError(f"{folder}: does not say which model it was: convert it by the command")
    named, size = ModelSource(source["name"], source["arguments"]), tuple(source["input_size"])
    return module, *_build_model(named, original, size), source


def _eval_facts(module: Any, original: Any, read: ImageData) -> dict[str, Any]:
    """What `eval` says: costs, and how good the answers are, beside the original's where it is known."""
    first, found = read.batches[0][:1], compare_models(module, original, read.batches, read.labels)
    models = {"": module} if original is None else {"": module, "original's ": original}
    facts: dict[str, Any] = {"images": found.images}
    for whose, model in models.items():
        facts[f"{whose}MACs an image"] = cost.count_macs(model, first)
        facts[f"{whose}parameters"] = cost.count_parameters(model)
        right = found.original_top1 if whose else found.top1
        if right is not None:
            facts[f"{whose}top-1 %"] = round(right, 2)
    if found.agreement is not None:
        facts["same answers as the original %"] = round(found.agreement, 2)
    if original is not None and found.error is not None:
        facts["relative output error"] = round(found.error, 5)
        before, after = interleaved_latency([original, module], first)
        facts["times as fast, both deployed, eager, batch 1"] = round(before / after, 2)
    return facts


@app.command(name="study")
def study_command(
    model: Model,
    layer: Annotated[str, typer.Option(help="name of the convolution to look at")],
    data: Annotated[Path, typer.Option(help="folder of images, or .npy, .npz, .safetensors")],
    output: Annotated[Path, typer.Option(help="folder for study.json and the pictures")],
    checkpoint_file: Annotated[
        Path | None, typer.Option("--checkpoint", help="trained weights; absent: random")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="images to look at, spread over what is there")] = 16,
    arg: Arguments = None,
    input_size: Size = None,
    as_json: AsJson = False,
) -> None:
    """How redundant are a layer's maps? Each made of each other by small kernels, and half of them of the other half.

    Example: ghostify study timm:resnet18 --layer layer1.0.conv1 --checkpoint resnet18.safetensors --data photos/
    --output study/
    """
    built, prepared = _build_model(_source(model, arg), checkpoint_file, parse_size(input_size))
    read = sources.read_data(data, prepared, limit=images, batch=images)
    found = study_layer(trace(built, read.batches[0][:1]), layer, read.batches)
    write_pictures(found, output)
    facts = found.to_dict()
    text = json.dumps(facts, indent=1)
    (output / "study.json").write_text(text + "\n")
    if as_json:
        print(text)
        return
    Console().print(study_table(found))
    median = facts["ghost_error_median"]
    print_line(f"as a ghost module at ratio 2: ghosts' relative error {median:.3f} (median)")
    print_line(f"{output}: study.json, pairs.png, ghosts.png")


@app.command(name="report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="a folder that `ghostify convert` wrote")],
    html: Annotated[Path | None, typer.Option(help="page to write; absent: a table on the terminal")] = None,
    original: Annotated[
        Path | None, typer.Option(help="the original's checkpoint, to compare answers and maps with")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="images to compare on, with labels or without")] = None,
    images: Annotated[int, typer.Option(min=1, help="use at most so many, spread over what is there")] = 256,
    layer: Annotated[
        list[str] | None, typer.Option(help="whose maps to show; absent: those that cost the most")
    ] = None,
    frontier: Annotated[Path | None, typer.Option(help="a curve that `ghostify plan --frontier` wrote")] = None,
    runtime: Annotated[str, typer.Option(help=f"runtime to time in: {', '.join(RUNTIMES)}, or none")] = "eager",
    allow: Allow = None,
    as_json: AsJson = False,
) -> None:
    """Show what was done to a converted model: on the terminal, or as a page with charts and pictures.

    Example: ghostify report out/ --html report.html --original resnet18.safetensors --data test/
    """
    if html is None:
        found = checkpoint.load(folder, allow=allow or ())
        show_report(report(found), str(folder), as_json)
        return
    if data is not None and original is None:
        raise GhostifyError("--data compares with the original: pass its checkpoint as --original, too")
    module, built, prepared, source = _load_pair(folder, original, allow)
    read = None if data is None else sources.read_data(data, prepared, limit=images, batch=32)
    write_report(
        module,
        html,
        original=built,
        example_inputs=sources.blank_input(prepared.size),
        images=() if read is None else read.batches,
        labels=None if read is None else read.labels,
        layers=layer,
        runtime=None if runtime == "none" else runtime,
        curve=() if frontier is None else read_frontier(frontier),
        title=f"{source['name']} at {format_shape(prepared.size)}",
    )
    print_line(f"{html}: {html.stat().st_size / 1e6:.1f} MB, needs no network")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what is on this machine: versions, threads, runtimes, extras, data.

    Example: ghostify doctor
    """
    show_facts(doctor_findings(), as_json)


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
    """Entry point: user errors are one line and exit code 2; models may come from the present folder."""
    sys.path.append(os.getcwd())
    try:
        app(standalone_mode=True)
    except GhostifyError as error:
        print(f"ghostify: {error}", file=sys.stderr)
        sys.exit(2)


def _top1_evaluator(path: Path, prepared: sources.Preprocessing, batch: int) -> Evaluate:
    """Top-1 on labelled images, in percent."""
    read = sources.read_data(path, prepared, batch=batch)
    labels = read.labels
    if labels is None:
        raise GhostifyError(f"{path}: has no labels to judge by: use class folders, or 'labels' in the file")
    return lambda model: top1(predict(model, read.batches), labels)
