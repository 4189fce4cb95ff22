"""Accuracy without training: the top-1 of a trained network before and after conversion.

    python benchmarks/experiments/accuracy.py --quick            ResNet-20 of width 32 on Fashion-MNIST, one seed
    python benchmarks/experiments/accuracy.py                    three seeds, more settings, fewer images
    python benchmarks/experiments/accuracy.py --network vgg16    VGG-16-BN for small images

The networks are trained here on the 60,000 training images (seed 0, once, then cached). Calibration takes unlabelled
training images, drawn by seed; no label and no gradient step is used. Top-1 is on all 10,000 test images, which
nothing else uses. Results go to benchmarks/results/accuracy.json, or accuracy-vgg16.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.networks import accuracy, calibration, images, resnet20, vgg16
from benchmarks.lib.tables import Row, options, publish
from ghostify import Policy, Rule, fit, plan, rewrite, trace
from ghostify.data.datasets import LabelledImages
from ghostify.fitting.initialization import untrained_weights
from ghostify.fitting.sensitivity import prepare_calibration
from ghostify.planning.cost import count_macs
from ghostify.search.budget import plan_for_budget


@dataclass(frozen=True)
class Form:
    """A kind of conversion; `budget` is a share of the multiply-accumulates. `seeds` draw the calibration images."""

    name: str
    rule: Rule
    budget: float | None = None
    images: int = 512
    seeds: tuple[int, ...] = (0,)


HALF = [
    Form("ratio 2, depthwise d=3", Rule(ratio=2)),
    Form("ratio 2, pointwise", Rule(ratio=2, cheap="pointwise")),
]
AUTO = [
    Form("auto, half the MACs", Rule(cheap="auto"), 0.5),
    Form("auto, a quarter of the MACs", Rule(cheap="auto"), 0.25),
]
QUARTER = [
    Form("ratio 4, depthwise d=3", Rule(ratio=4)),
    Form("ratio 4, pointwise", Rule(ratio=4, cheap="pointwise")),
]
KERNELS = [
    Form("ratio 2, depthwise d=1", Rule(ratio=2, dw_size=1)),
    Form("ratio 2, depthwise d=5", Rule(ratio=2, dw_size=5)),
]
SEEDS = [replace(form, seeds=(0, 1, 2)) for form in (*HALF, *AUTO)]
FEWER = [replace(form, images=64) for form in (*HALF, *AUTO)]


def rows(model: nn.Module, data: LabelledImages, forms: list[Form]) -> Iterator[Row]:
    """One row for each conversion."""
    first = data.test[:1]
    program = trace(model, first)
    base = accuracy(model, data)

    def row(how: str, module: nn.Module, seconds: float = 0.0, image_count: int = 0) -> Row:
        top = accuracy(module, data)
        return {
            "how": how,
            "top1": top,
            "drop": base - top,
            "macs": count_macs(module, first),
            "seconds": seconds,
            "images": image_count,
        }

    yield row("original", model)
    for form in forms:
        policy = Policy((form.rule,))
        if form.budget is None and form.images == 512:
            ghost_plan = plan(program, policy)
            if form.rule == Rule(ratio=2):
                yield row(
                    f"{form.name}, random ghosts", rewrite(program, ghost_plan, untrained_weights(program, ghost_plan))
                )
            data_free = fit(program, ghost_plan)
            yield row(
                f"{form.name}, no images",
                rewrite(program, ghost_plan, data_free.weights),
                sum(data_free.seconds.values()),
            )
        for seed in form.seeds:
            started = time.perf_counter()
            calibrated = prepare_calibration(program, calibration(data, form.images, seed).split(64), seed)
            if form.budget is None:
                ghost_plan = plan(program, policy)
            else:
                ghost_plan = plan_for_budget(program, policy, {"macs": form.budget}, calibrated, seed)
            module = rewrite(program, ghost_plan, fit(program, ghost_plan, calibrated, seed=seed).weights)
            elapsed = time.perf_counter() - started
            yield row(f"{form.name}, {form.images} images, seed {seed}", module, elapsed, form.images)


NETWORKS = {
    "resnet20": (resnet20, "accuracy", [*SEEDS, *FEWER, *KERNELS, *QUARTER]),
    "vgg16": (vgg16, "accuracy-vgg16", [*HALF, *QUARTER, *AUTO]),
}


def main() -> None:
    parser = options(__doc__, quick="the settings of the README's table, one seed")
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    arguments = parser.parse_args()
    data = images()
    build, name, forms = NETWORKS[arguments.network]
    publish(name, rows(build(data), data, [*HALF, *AUTO] if arguments.quick else forms))


if __name__ == "__main__":
    main()
