"""`ghostify demo`: real images that are on the machine, a small residual network, and what converting does to it."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ghostify.api import ghostify
from ghostify.data.datasets import LabelledImages, digits, fashion_mnist
from ghostify.errors import GhostifyError
from ghostify.evaluation.metrics import predict, top1
from ghostify.io.checkpoint import load, load_weights, save
from ghostify.planning.cost import count_macs, count_parameters
from ghostify.timing.latency import interleaved_latency


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al., 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualNet(nn.Module):
    """The CIFAR residual network of depth 6 b + 2 with `width`, 2 and 4 `width` maps (He et al., 2015, section 4.2)."""

    def __init__(self, depth: int = 20, width: int = 16, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        blocks, widths = (depth - 2) // 6, (width, 2 * width, 4 * width)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        layers, inputs = [], width
        for stage, maps in enumerate(widths):
            for block in range(blocks):
                layers.append(ResidualBlock(inputs, maps, 2 if stage and not block else 1))
                inputs = maps
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: float,
    learning_rate: float = 0.2,
    batch: int = 128,
    weight_decay: float = 5e-4,
    flip: bool = True,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Train in place: one-cycle SGD, bfloat16 autocast, random shifts (and flips); returns the steps taken."""
    generator = torch.Generator().manual_seed(seed)
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=weight_decay, nesterov=True)
    steps = max(8, int(epochs * (len(images) // batch)))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.25)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(images), generator=generator)
        index, order = order[:batch], order[batch:]
        x = _shifted(images[index], flip, generator).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, steps)
    model.eval()
    return steps


def _shifted(x: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    pad = max(1, x.shape[-1] // 14)
    top, left = torch.randint(0, 2 * pad + 1, (2,), generator=generator).tolist()
    x = F.pad(x, (pad,) * 4, value=float(x.min()))[..., top : top + x.shape[-2], left : left + x.shape[-1]]
    mirrored = (torch.rand(len(x), generator=generator) < 0.5) & flip
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


@dataclass(frozen=True)
class Result:
    """One row of the demo's table."""

    name: str
    accuracy: float
    macs: int
    parameters: int
    latency_ms: float


def run_demo(output: Path | None, console: Console, as_json: bool = False, seed: int = 0) -> list[Result]:
    """Train, save, convert with and without images, fine-tune, save, reload: the demo's story, told on `console`."""
    images = fashion_mnist() or digits()
    torch.manual_seed(seed)
    small = len(images.train) < 10_000
    network = ResidualNet(8, 16, classes=images.classes)
    console.print(
        f"{len(images.train):,} training and {len(images.test):,} test images: {images.name}", highlight=False
    )
    with Progress(TextColumn("training"), BarColumn(), TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("")
        show = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        train(network, images.train, images.train_labels, epochs=30 if small else 2, flip=not small, progress=show)
    network.to(memory_format=torch.contiguous_format)
    with tempfile.TemporaryDirectory() as scratch:
        folder = output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), folder / "original.safetensors")
        trained = load_weights(ResidualNet(8, 16, classes=images.classes), folder / "original.safetensors").eval()
        converted = _convert(trained, images, small, seed)
        tuned = converted["calibrated, fine-tuned"]
        save(tuned, folder / "converted")
        reloaded = load(folder / "converted")
    same = torch.equal(predict(reloaded, [images.test]), predict(tuned, [images.test]))
    results = _measure({"original": trained, **converted}, images)
    _show(results, console, as_json)
    console.print(f"saved, reloaded without pickle: answers {'bit-equal' if same else 'DIFFERENT'}", highlight=False)
    if not same:
        raise GhostifyError("the reloaded model answers differently: please report this with `pip list`")
    return results


def _convert(trained: nn.Module, images: LabelledImages, small: bool, seed: int) -> dict[str, nn.Module]:
    """Converted without images, with 256 unlabelled training images, and the latter after a short round of training."""
    first = images.train[:1]
    calibration = images.train[: 256 if small else 512].split(64)
    free = ghostify(trained, 2, example_inputs=first)
    calibrated = ghostify(trained, 2, example_inputs=first, calibration=calibration, seed=seed)
    tuned = copy.deepcopy(calibrated)
    train(
        tuned,
        images.train,
        images.train_labels,
        epochs=5 if small else 0.25,
        learning_rate=0.02,
        flip=not small,
        seed=seed,
    )
    tuned.to(memory_format=torch.contiguous_format)
    return {"converted, no images": free, "calibrated": calibrated, "calibrated, fine-tuned": tuned}


def _measure(models: dict[str, nn.Module], images: LabelledImages) -> list[Result]:
    times = interleaved_latency(list(models.values()), images.test[:16])
    results = []
    for (name, model), milliseconds in zip(models.items(), times, strict=True):
        right = top1(predict(model, images.test.split(500)), images.test_labels)
        results.append(Result(name, right, count_macs(model, images.test[:1]), count_parameters(model), milliseconds))
    return results


def _show(results: list[Result], console: Console, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(r) for r in results], indent=1))
        return
    table = Table()
    for heading in ("model", "top-1 %", "MACs", "parameters", "ms for 16"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for r in results:
        macs = f"{r.macs / 1e6:.1f} M"
        table.add_row(r.name, f"{r.accuracy:.2f}", macs, f"{r.parameters:,}", f"{r.latency_ms:.1f}")
    console.print(table)
