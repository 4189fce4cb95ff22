"""The `ghostify` command: each command parses its options and calls the library."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ghostify import __version__
from ghostify.api import ghostify
from ghostify.arguments import MAX_SEED
from ghostify.cli import checks, doctor, eval_facts
from ghostify.cli.console import print_line, print_table, progress_bar, show_facts, show_report
from ghostify.cli.demo import run_demo
from ghostify.cli.exit_codes import MISTAKE, run
from ghostify.cli.loading import build_model, check_labels, load_pair, model_source, top1_evaluator
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
    Folder,
    Format,
    FormerPrune,
    FreeBatch,
    Ignore,
    Images,
    Model,
    Original,
    Overwrite,
    PolicyFile,
    Prune,
    Ratio,
    Runtime,
    Settings,
    Size,
    Targets,
    Validation,
)
from ghostify.cli.parsing import (
    given_rule_options,
    is_given,
    parse_budget,
    parse_policy,
    parse_recipe,
    parse_size,
    ratio_of_rule,
)
from ghostify.data.saved_source import parse_input_size
from ghostify.data.sources import blank_input, read_data
from ghostify.data.training_data import DATASETS, load_training_data
from ghostify.deployment.exporter import export_file
from ghostify.errors import GhostifyError
from ghostify.fitting.distributed import rank_and_world_size
from ghostify.graph.tracing import trace
from ghostify.io.atomic import check_output_file, check_output_folder
from ghostify.io.checkpoint import load, save
from ghostify.planning.planner import plan
from ghostify.reporting.builder import write_report
from ghostify.reporting.html import is_page
from ghostify.reporting.redundancy import study_layer, study_table, write_study
from ghostify.runtimes.registry import RUNTIMES
from ghostify.search.budget import plan_for_budget
from ghostify.search.forecast import with_forecast
from ghostify.search.pareto import POINTS, frontier_table, is_frontier, read_frontier, write_frontier
from ghostify.search.pareto import frontier as compute_frontier
from ghostify.summary import build_report, conversion_info, report
from ghostify.text import format_shape
from ghostify.training.recipe import MAX_COUNT
from ghostify.training.run_folder import check_run_folder, metrics_of
from ghostify.training.trainer import finetune

app = typer.Typer(add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def root_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Rewrite the convolutions of a trained network into cheaper ones, and inspect the result."""
    if version:
        print(f"ghostify {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(MISTAKE)


@app.command("plan")
def plan_command(
    context: typer.Context,
    model: Model,
    ratio: Ratio = 2.0,
    dw_size: DwSize = 3,
    cheap: Cheap = "depthwise",
    activated: Activated = False,
    prune: Prune = False,
    former_prune: FormerPrune = False,
    target: Targets = None,
    ignore: Ignore = None,
    policy: PolicyFile = None,
    budget: Budget = None,
    runtime: Runtime = "eager",
    frontier: Annotated[
        Path | None,
        typer.Option(help="write the error-cost frontier to this JSON file"),
    ] = None,
    points: Annotated[int, typer.Option(min=2, max=1000, help="number of plans on the frontier")] = POINTS,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            callback=checks.existing_file("--checkpoint"),
            help="trained weights, for budgets and frontiers; default: initial weights",
        ),
    ] = None,
    calibration: Calibration = None,
    validation: Validation = None,
    images: Images = 512,
    batch: Batch = 32,
    arg: Arguments = None,
    input_size: Size = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show the plan for each convolution without converting anything.

    With --frontier, show the predicted error against the first cost named by --budget (default: MACs).

    Example: ghostify plan timm:resnet18 --ratio 2

    Example: ghostify plan timm:resnet18 --checkpoint resnet18.safetensors --calibration photos/ --cheap auto
    --frontier curve.json
    """
    limits = parse_budget(budget)
    given, pruned = given_rule_options(context), prune or former_prune
    rule_ratio = ratio_of_rule(ratio, given, planned=limits is not None or frontier is not None)
    rules = parse_policy(policy, rule_ratio, dw_size, cheap, activated, pruned, target, ignore, given)
    if frontier is None and (is_given(context, "points") or validation is not None):
        raise GhostifyError("--points, --validation: are of the frontier. Pass --frontier FILE, or leave them out.")
    if frontier is not None:
        check_output_file(frontier, is_frontier, overwrite=overwrite)
    network, prepared = build_model(model_source(model, arg), checkpoint, parse_size(input_size))
    program = trace(network, blank_input(prepared.size))
    batches = None if calibration is None else read_data(calibration, prepared, limit=images, batch=batch).batches
    title = f"{model} at {format_shape(prepared.size)}"
    if frontier is None:
        if limits is not None:
            planned = plan_for_budget(program, rules, limits, batches, 0, runtime)
        else:
            planned = plan(program, rules)
            planned = planned if batches is None else with_forecast(program, planned, batches)
        show_report(build_report(planned), title, as_json)
        return
    evaluate = None if validation is None else top1_evaluator(validation, prepared, batch, network)
    cost = next(iter(limits or {"macs": 1.0}))
    curve = compute_frontier(program, rules, cost, batches, evaluate=evaluate, runtime=runtime, points=points)
    write_frontier(curve, frontier)
    if as_json:
        print(frontier.read_text(), end="")
    else:
        print_table(frontier_table(curve, title))


@app.command("convert")
def convert_command(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option(help="folder to write")],
    checkpoint: Annotated[
        Path,
        typer.Option(callback=checks.existing_file("--checkpoint"), help="trained weights: safetensors, .pt or .pth"),
    ],
    ratio: Ratio = 2.0,
    dw_size: DwSize = 3,
    cheap: Cheap = "depthwise",
    activated: Activated = False,
    prune: Prune = False,
    former_prune: FormerPrune = False,
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
        bool,
        typer.Option("--reconstruct", help="after the fit, take gradient steps block by block on the same images"),
    ] = False,
    heal: Annotated[
        float | None,
        typer.Option(
            callback=checks.heal,
            help="after the fit, take gradient steps on the whole model for so many seconds, on the same images",
        ),
    ] = None,
    arg: Arguments = None,
    input_size: Size = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="seed of the sampled positions")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Convert a trained model and save the result as a folder.

    Example: ghostify convert timm:resnet18 --checkpoint resnet18.safetensors --calibration photos/ --cheap auto
    --budget macs=0.5 --output out/
    """
    check_output_folder(output, overwrite=overwrite)
    source = model_source(model, arg)
    limits = parse_budget(budget)
    given, pruned = given_rule_options(context), prune or former_prune
    rule_ratio = ratio_of_rule(ratio, given, planned=limits is not None)
    rules = parse_policy(policy, rule_ratio, dw_size, cheap, activated, pruned, target, ignore, given)
    network, prepared = build_model(source, checkpoint, parse_size(input_size))
    data = None if calibration is None else read_data(calibration, prepared, limit=images, batch=batch)
    with progress_bar("fitting", as_json) as on_progress:
        converted = ghostify(
            network,
            policy=rules,
            budget=limits,
            example_inputs=blank_input(prepared.size),
            calibration=None if data is None else data.batches,
            evaluate=None if validation is None else top1_evaluator(validation, prepared, batch, network),
            runtime=runtime,
            reconstruct=reconstruct,
            heal=heal,
            seed=seed,
            on_progress=on_progress,
        )
    stored_source = {**source.to_dict(), "input_size": list(prepared.size)}
    save(converted, output, source=stored_source, overwrite=overwrite)
    summary = report(converted)
    fit = "data-free" if data is None else f"fitted to {summary.images} images in {summary.fit_time}"
    show_report(summary, f"{model} -> {output}, {fit}", as_json)


@app.command("eval")
def eval_command(
    folder: Folder,
    data: Annotated[
        Path,
        typer.Option(
            callback=checks.data_path("--data"),
            help="images in class folders, or an array file with images and labels",
        ),
    ],
    original: Annotated[
        Path | None,
        typer.Option(
            callback=checks.existing_file("--original"),
            help="checkpoint of the original, to compare outputs and speed with",
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="maximum number of images, sampled evenly")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="images per batch")] = 32,
    allow: Allow = None,
    as_json: AsJson = False,
) -> None:
    """Measure a converted model, and compare it with the original. Shows accuracy, MACs, parameters and speedup.

    Example: ghostify eval out/ --data test/ --original resnet18.safetensors
    """
    pair = load_pair(folder, original, allow)
    image_data = read_data(data, pair.preprocessing, limit=images, batch=batch)
    check_labels(data, image_data, pair.converted)
    facts = eval_facts.collect_facts(pair.converted, None if original is None else pair.original, image_data)
    show_facts(facts, eval_facts.LABELS, as_json)


@app.command("finetune")
def finetune_command(
    folder: Folder,
    data: Annotated[
        str,
        typer.Option(
            callback=checks.data_path("--data", DATASETS),
            help="fashion-mnist, cifar10, or a folder of images, of class folders, or of train/ and val/ with class "
            "folders, or an array file",
        ),
    ],
    original: Original,
    output: Annotated[Path, typer.Option(help="folder to write; OUTPUT.training keeps the state of the training")],
    epochs: Annotated[float, typer.Option(callback=checks.epochs, help="passes through the training images")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="images per step, over all processes")] = 128,
    learning_rate: Annotated[
        float, typer.Option("--lr", callback=checks.learning_rate, help="peak learning rate")
    ] = 0.02,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="seed of the image order and the augmentation")] = 0,
    settings: Settings = None,
    allow: Allow = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train a converted model towards the original's outputs. Resumes after an interruption.

    Example: ghostify finetune out/ --data photos/ --original resnet18.safetensors --batch 8 --output tuned/

    In several processes: accelerate launch -m ghostify finetune ...
    """
    recipe = parse_recipe(epochs, batch, learning_rate, seed, settings)
    training_folder = Path(f"{output}.training")
    rank, _ = rank_and_world_size()
    if not rank:
        check_output_folder(output, overwrite=overwrite)
        check_run_folder(training_folder)
    pair = load_pair(folder, original, allow)
    training_data = load_training_data(data, pair.preprocessing, seed)
    with progress_bar("training", as_json) as on_progress:
        tuned = finetune(pair.converted, pair.original, training_data, training_folder, recipe, on_progress=on_progress)
    if rank:
        return
    save(tuned, output, source=pair.source, overwrite=overwrite)
    evaluations = [entry for entry in metrics_of(training_folder) if "validation" in entry]
    if as_json:
        print(json.dumps({"output": str(output), "evaluations": evaluations}, indent=1))
        return
    metric = "top-1" if training_data.labelled else "agreement with the original"
    for entry in evaluations:
        print_line(f"step {entry['step']}: {metric} {entry['validation']:.2f} % on the validation images")
    print_line(f"{output}: the best of these; metrics in {training_folder}")


@app.command("export")
def export_command(
    folder: Folder,
    format: Format = "onnx",
    output: Annotated[Path | None, typer.Option(help="folder to write; default: the same folder")] = None,
    input_size: Size = None,
    allow: Allow = None,
    overwrite: Overwrite = False,
    dynamic: FreeBatch = None,
) -> None:
    """Export a converted model for another runtime. Writes its inference form and verifies the outputs there.

    Example: ghostify export out/ --format onnx
    """
    target = output or (folder if folder.name not in ("", "..") else folder.resolve())
    check_output_folder(target, overwrite=overwrite)
    converted = load(folder, allow=allow or ())
    size = parse_size(input_size) or parse_input_size(conversion_info(converted).source, folder)
    if size is None:
        raise GhostifyError(f"{folder}: does not state the input size. Pass --input-size C,H,W.")
    written = export_file(
        converted,
        target,
        format=format,
        example_inputs=blank_input(size),
        dynamic=dynamic,
        overwrite=overwrite,
    )
    batch = "any batch" if written.free_batch else "a batch of 1"
    reason = f" (its size cannot be free: {written.fixed_reason})" if written.fixed_reason else ""
    print_line(f"{written.path}: {written.path.stat().st_size / 1e6:.1f} MB, {batch} of {format_shape(size)}{reason}")


@app.command("study")
def study_command(
    model: Model,
    layer: Annotated[str, typer.Option(help="name of the convolution")],
    data: Annotated[
        Path,
        typer.Option(callback=checks.data_path("--data"), help="folder of images, or .npy, .npz, .safetensors"),
    ],
    output: Annotated[Path, typer.Option(help="folder for study.json and the pictures")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(callback=checks.existing_file("--checkpoint"), help="trained weights; default: initial weights"),
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="maximum number of images, sampled evenly")] = 16,
    arg: Arguments = None,
    input_size: Size = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure how well the maps of a layer predict each other.

    Predicts each map from one other map, and half of the maps from the other half.

    Example: ghostify study timm:resnet18 --layer layer1.0.conv1 --checkpoint resnet18.safetensors --data photos/
    --output study/
    """
    check_output_folder(output, overwrite=overwrite)
    network, prepared = build_model(model_source(model, arg), checkpoint, parse_size(input_size))
    batches = read_data(data, prepared, limit=images, batch=images).batches
    study = study_layer(trace(network, batches[0][:1]), layer, batches)
    text = write_study(study, output, overwrite=overwrite)
    if as_json:
        print(text)
        return
    print_table(study_table(study))
    median = study.to_dict()["ghost_error_median"]
    print_line(f"as a ghost module at ratio 2: median relative error of the ghosts {median:.3f}")
    print_line(f"{output}: study.json, pairs.png, ghosts.png")


@app.command("report")
def report_command(
    folder: Folder,
    html: Annotated[
        Path | None,
        typer.Option(help="HTML file to write; default: a table on the terminal"),
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(
            callback=checks.existing_file("--original"),
            help="checkpoint of the original, to compare outputs and maps with",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(callback=checks.data_path("--data"), help="images for the comparison, with or without labels"),
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="maximum number of images, sampled evenly")] = 256,
    layer: Annotated[
        list[str] | None, typer.Option(help="layer whose maps are shown; default: those with the largest error")
    ] = None,
    frontier: Annotated[
        Path | None,
        typer.Option(
            callback=checks.existing_file("--frontier"), help="JSON file written by `ghostify plan --frontier`"
        ),
    ] = None,
    runtime: Annotated[
        str,
        typer.Option(callback=checks.report_runtime, help=f"runtime to time in: {', '.join(RUNTIMES)}, or none"),
    ] = "eager",
    allow: Allow = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show what the conversion did, layer by layer. Prints a table, or writes an HTML page with charts and pictures.

    Example: ghostify report out/ --html report.html --original resnet18.safetensors --data test/
    """
    if html is None:
        for option, value in (("--original", original), ("--data", data), ("--layer", layer), ("--frontier", frontier)):
            if value:
                raise GhostifyError(f"{option}: is for the page. Pass --html FILE, too.")
        show_report(report(load(folder, allow=allow or ())), str(folder), as_json)
        return
    check_output_file(html, is_page, overwrite=overwrite)
    if data is not None and original is None:
        raise GhostifyError("--data: needs the original to compare with. Pass its checkpoint as --original.")
    curve = () if frontier is None else read_frontier(frontier)
    pair = load_pair(folder, original, allow)
    image_data = None if data is None else read_data(data, pair.preprocessing, limit=images, batch=32)
    if data is not None and image_data is not None:
        check_labels(data, image_data, pair.converted)
    write_report(
        pair.converted,
        html,
        original=pair.original,
        example_inputs=blank_input(pair.preprocessing.size),
        images=() if image_data is None else image_data.batches,
        labels=None if image_data is None else image_data.labels,
        layers=layer,
        runtime=None if runtime == "none" else runtime,
        curve=curve,
        title=f"{pair.source['name']} at {format_shape(pair.preprocessing.size)}",
        overwrite=overwrite,
    )
    print_line(f"{html}: {html.stat().st_size / 1e6:.1f} MB, works offline")


@app.command("doctor")
def doctor_command(as_json: AsJson = False) -> None:
    """Show the versions, runtimes, extras and data of this machine.

    Example: ghostify doctor
    """
    show_facts(doctor.collect_facts(), doctor.LABELS, as_json)


@app.command("demo")
def demo_command(
    output: Annotated[
        Path | None, typer.Option(help="folder to keep the checkpoint and the converted model in")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train a small network, convert it and compare the two. Uses images that are on this machine.

    Example: ghostify demo
    """
    run_demo(output, Console(stderr=as_json), as_json, overwrite=overwrite)


def main() -> None:
    """Run the command and end the process with its exit code (see `exit_codes`).

    The current folder is on the import path, for models of the user.
    """
    sys.path.append(os.getcwd())
    sys.exit(run(app))
