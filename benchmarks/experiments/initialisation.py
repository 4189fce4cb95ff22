"""Effect of the initialisation: ghost networks fine-tuned from different initialisations, and trained from scratch.

    python benchmarks/experiments/initialisation.py
    python benchmarks/experiments/initialisation.py --summary

ResNet-20 of width 16 on Fashion-MNIST, trained 6 epochs (networks.py); ratio 2, depthwise d = 3, every dense
convolution except the first. "auto" is a plan with as many multiply-accumulates, depthwise or pointwise. Random ghosts
draw all weights of every ghost module; "first filters kept" draws only the cheap kernels; fits use no images, or 512
unlabelled ones. All are then trained on the 60,000 labelled training images for 0, a quarter, 0.6 (a tenth of the
original's schedule), 1 and 4 epochs (one-cycle SGD, batch 128). Each uses the peak learning rate that is best on 5,000
holdout training images within a quarter of an epoch: of 0.005, 0.02 and 0.1 for less than an epoch, of 0.02, 0.1 and
0.2 for longer. "Distilled" also learns the original's outputs, by `finetune`, for at most an epoch. From scratch: the
ghost network with everything random, for the original's 6 epochs at its learning rate, 0.2. Seeds draw calibration
images, kernels and the order of training. Top-1 is on all 10,000 test images. Resumes after an interruption; results
go to benchmarks/results/initialisation.json.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib import networks
from benchmarks.lib.catalogue import EPOCHS, SCHEDULE, initialisations
from benchmarks.lib.tables import Row, options, publish, recorded
from ghostify import Policy, Recipe, Rule, finetune, fit, plan, rewrite, trace
from ghostify.cli.demo_network import train
from ghostify.data.datasets import LabelledImages
from ghostify.data.training_data import TrainingData
from ghostify.evaluation.metrics import predict, top1
from ghostify.fitting.sensitivity import prepare_calibration
from ghostify.graph.program import Program
from ghostify.search.budget import plan_for_budget

SEEDS = (0, 1, 2)
BRIEF, LONG = (0.005, 0.02, 0.1), (0.02, 0.1, 0.2)
RATE, HOLDOUT, IMAGES = 0.2, 5_000, 512
Start = Callable[[Program, LabelledImages, int], nn.Module]


def untrained(program: Program, _: LabelledImages, seed: int, *, keep_filters: bool) -> nn.Module:
    return networks.untrained_ghosts(program, plan(program, Policy((Rule(),))), seed, keep_filters=keep_filters)


def without_images(program: Program, _: LabelledImages, __: int) -> nn.Module:
    ghost_plan = plan(program, Policy((Rule(),)))
    return rewrite(program, ghost_plan, fit(program, ghost_plan).weights)


def calibrated(program: Program, data: LabelledImages, seed: int, *, cheap: str) -> nn.Module:
    prepared = prepare_calibration(program, networks.calibration(data, IMAGES, seed).split(64), seed)
    ghost_plan = plan(program, Policy((Rule(),)))
    if cheap == "auto":
        share = ghost_plan.macs_after / ghost_plan.macs_before
        ghost_plan = plan_for_budget(program, Policy((Rule(cheap=cheap),)), {"macs": share}, prepared, seed)
    return rewrite(program, ghost_plan, fit(program, ghost_plan, prepared, seed=seed).weights)


def scratch(program: Program, data: LabelledImages, seed: int) -> nn.Module:
    module = untrained(program, data, seed, keep_filters=False)
    torch.manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            layer.reset_parameters()
    return module


STARTS: dict[str, Start] = {
    "random ghosts": partial(untrained, keep_filters=False),
    "first filters kept": partial(untrained, keep_filters=True),
    "fitted without images": without_images,
    "fitted to 512 images, depthwise": partial(calibrated, cheap="depthwise"),
    "fitted to 512 images, auto": partial(calibrated, cheap="auto"),
}
DISTILLED, FROM_SCRATCH = "fitted to 512 images, auto, distilled and labelled", "from scratch"
Training = Callable[[nn.Module, LabelledImages, float, float, int], nn.Module]


def trained(module: nn.Module, data: LabelledImages, epochs: float, rate: float, seed: int) -> nn.Module:
    """A copy after so many epochs of labelled training."""
    trained_copy = copy.deepcopy(module)
    if epochs:
        train(trained_copy, data.train, data.train_labels, epochs=epochs, learning_rate=rate, seed=seed)
    return trained_copy


def distilled(
    original: nn.Module, module: nn.Module, data: LabelledImages, epochs: float, rate: float, seed: int
) -> nn.Module:
    """The same towards labels and the original's outputs."""
    images = TensorDataset(data.train, data.train_labels)
    training_data = TrainingData(images, Subset(images, range(128)), labelled=True)  # evaluated once, at the end
    recipe = Recipe(epochs=epochs, learning_rate=rate, labels=1.0, precision="bf16", evaluate_every=epochs, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        return finetune(module, original, training_data, folder, recipe)


def best_rate(training: Training, module: nn.Module, data: LabelledImages, rates: tuple[float, ...]) -> float:
    """The best rate for a quarter of an epoch, by the top-1 on holdout images."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(99))
    holdout, remaining = order[:HOLDOUT], order[HOLDOUT:]
    reduced = LabelledImages(
        data.name, data.train[remaining], data.train_labels[remaining], data.test, data.test_labels, data.classes
    )

    def holdout_top1(rate: float) -> float:
        trained_module = training(module, reduced, 0.25, rate, 0)
        return top1(predict(trained_module, data.train[holdout].split(500)), data.train_labels[holdout])

    return max(rates, key=holdout_top1)


def rates_for(epochs: float) -> tuple[float, ...]:
    return BRIEF if epochs < 1 else LONG


def rows(previous_rows: list[Row]) -> Iterator[Row]:
    yield from previous_rows
    finished = {row["how"] for row in previous_rows}
    best = {(row["start"], rates_for(row["epochs"])): row["rate"] for row in previous_rows if row.get("epochs")}
    data = networks.images()
    model = networks.resnet20(data, width=16)
    program = trace(model, data.train[:1])
    if "original" not in finished:
        yield {"how": "original", "top1": networks.accuracy(model, data)}
    for seed in SEEDS:
        others = {DISTILLED: STARTS["fitted to 512 images, auto"], FROM_SCRATCH: scratch}
        for start, initialise in {**STARTS, **others}.items():
            lengths = {DISTILLED: EPOCHS[1:4], FROM_SCRATCH: (SCHEDULE,)}.get(start, EPOCHS)
            training = partial(distilled, model) if start == DISTILLED else trained
            missing = [e for e in lengths if f"{start}, {e} epochs, seed {seed}" not in finished]
            module = initialise(program, data, seed) if missing else None
            for epochs in missing:
                assert module is not None
                key = start, rates_for(epochs)
                if epochs and key not in best:
                    best[key] = RATE if start == FROM_SCRATCH else best_rate(training, module, data, key[1])
                trained_module = training(module, data, epochs, best.get(key, 0.0), seed)
                facts = {"start": start, "epochs": epochs, "seed": seed, "rate": best.get(key)}
                yield {
                    "how": f"{start}, {epochs} epochs, seed {seed}",
                    **facts,
                    "top1": networks.accuracy(trained_module, data),
                }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--summary", action="store_true", help="only show the means of the result file")
    arguments = parser.parse_args()
    previous_rows = recorded("initialisation")
    if arguments.summary:
        print(initialisations(previous_rows))
        return
    publish("initialisation", rows(previous_rows))


if __name__ == "__main__":
    main()
