"""`ghostify demo`: train a small network on images of this machine, convert it and compare the results."""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from ghostify.api import ghostify
from ghostify.cli.demo_network import ResidualNet, train
from ghostify.data.datasets import LabelledImages, digits, fashion_mnist
from ghostify.errors import GhostifyError
from ghostify.evaluation.metrics import predict, top1
from ghostify.io.atomic import check_output_folder, staged_folder
from ghostify.io.checkpoint import load, load_weights, save
from ghostify.io.tensor_writer import write_tensors
from ghostify.planning.cost import count_macs, count_parameters
from ghostify.timing.latency import interleaved_latency


@dataclass(frozen=True)
class Result:
    """One row of the demo's table: top-1 in percent, MACs of one image, latency of 16 images."""

    name: str
    accuracy: float
    macs: int
    parameters: int
    latency_ms: float


def run_demo(output: Path | None, console: Console, as_json: bool = False, seed: int = 0) -> list[Result]:
    """Train, save, convert with and without images, fine-tune, save and reload a network; prints on `console`.

    The original's checkpoint and the converted model stay in the folder `output`, if given. Raises `GhostifyError` if
    the reloaded model computes different outputs.
    """
    if output is not None:
        _check_empty(output)
    images = fashion_mnist() or digits()
    is_small = len(images.train) < 10_000
    console.print(
        f"{len(images.train):,} training and {len(images.test):,} test images: {images.name}", highlight=False
    )
    if output is not None:
        check_output_folder(output)
    network = _train_original(images, is_small, console, seed)
    with tempfile.TemporaryDirectory() as temporary, staged_folder(output or Path(temporary)) as folder:
        write_tensors(folder / "original.safetensors", network.state_dict())
        original = load_weights(_build_network(images), folder / "original.safetensors").eval()
        converted = _convert(original, images, is_small, seed)
        tuned = converted["calibrated, fine-tuned"]
        save(tuned, folder / "converted")
        reloaded = load(folder / "converted")
    is_equal = torch.equal(predict(reloaded, [images.test]), predict(tuned, [images.test]))
    results = _measure({"original": original, **converted}, images)
    _show(results, console, as_json)
    console.print(
        f"saved and reloaded without pickle: outputs {'bit-equal' if is_equal else 'DIFFERENT'}", highlight=False
    )
    if not is_equal:
        raise GhostifyError(
            "demo: the reloaded model computes different outputs. Report this, with the output of `pip list`."
        )
    return results


def _check_empty(folder: Path) -> None:
    """Raise `GhostifyError` for a place that is not a new or empty folder."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise GhostifyError(f"--output {folder}: {existing} is a file. Name a folder.")
    if folder.exists() and any(folder.iterdir()):
        raise GhostifyError(f"--output {folder}: holds other files. Name a new folder.")


def _build_network(images: LabelledImages) -> ResidualNet:
    return ResidualNet(8, 16, classes=images.classes)


def _train_original(images: LabelledImages, is_small: bool, console: Console, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = _build_network(images)
    with Progress(TextColumn("training"), BarColumn(), TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("")

        def on_progress(step: int, steps: int) -> None:
            bar.update(task, completed=step, total=steps)

        epochs = 30 if is_small else 2
        train(network, images.train, images.train_labels, epochs=epochs, flip=not is_small, on_progress=on_progress)
    return network.to(memory_format=torch.contiguous_format)


def _convert(original: nn.Module, images: LabelledImages, is_small: bool, seed: int) -> dict[str, nn.Module]:
    """The original converted without images, with unlabelled training images, and the latter after a short training."""
    example = images.train[:1]
    calibration = images.train[: 256 if is_small else 512].split(64)
    data_free = ghostify(original, 2, example_inputs=example)
    calibrated = ghostify(original, 2, example_inputs=example, calibration=calibration, seed=seed)
    tuned = copy.deepcopy(calibrated)
    train(
        tuned,
        images.train,
        images.train_labels,
        epochs=5 if is_small else 0.25,
        learning_rate=0.02,
        flip=not is_small,
        seed=seed,
    )
    tuned.to(memory_format=torch.contiguous_format)
    return {"converted, no images": data_free, "calibrated": calibrated, "calibrated, fine-tuned": tuned}


def _measure(models: dict[str, nn.Module], images: LabelledImages) -> list[Result]:
    latencies_ms = interleaved_latency(list(models.values()), images.test[:16])
    results = []
    for (name, model), latency_ms in zip(models.items(), latencies_ms, strict=True):
        accuracy = top1(predict(model, images.test.split(500)), images.test_labels)
        results.append(Result(name, accuracy, count_macs(model, images.test[:1]), count_parameters(model), latency_ms))
    return results


def _show(results: list[Result], console: Console, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(r) for r in results], indent=1))
        return
    table = Table()
    for heading in ("model", "top-1 %", "MACs", "parameters", "ms, batch 16"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for r in results:
        macs = f"{r.macs / 1e6:.1f} M"
        table.add_row(r.name, f"{r.accuracy:.2f}", macs, f"{r.parameters:,}", f"{r.latency_ms:.1f}")
    console.print(table)
