"""ghostify and other methods, at equal multiply-accumulates and at equal measured milliseconds.

    python benchmarks/experiments/compare.py --network resnet20      or resnet56, vgg16, mobilenet, craft

Fashion-MNIST: the networks are trained here on the 60,000 training images (networks.py). Every method gets the same
512 unlabelled training images, drawn by seed; only Taylor pruning also reads their labels. Each result is evaluated
without training, and after one epoch of distillation from the original on 10,000 other unlabelled training images (78
steps of 128, SGD, cosine from 0.02, and again from 0.005; the one that is nearer to the original on 500 more training
images is kept). Top-1 is on all 10,000 test images, which nothing else uses. BatchNorm's statistics are re-estimated
on the calibration images where no fit sets them; other methods keep the old ones where that is nearer to the
original's outputs on those images. CRAFT has no labels: F1 of its boxes compared with the original's on test pages,
without training (craft.py).

Every method gives the largest model within the limit: a share of the multiply-accumulates, or of the milliseconds of
32 images (one page of 256 x 256) in eager PyTorch, both models in inference form, median of 15 rounds. A method for
which a limit is infeasible has no row there. Milliseconds hardly depend on the seed: they are measured for the first
seed only, and not at all with --untimed, so that networks can be compared in parallel with one thread each. --limits
latency measures nothing else. Resumes after an interruption; results go to benchmarks/results/compare-NETWORK.json.
Trainings differ between machines in the last bits: rows of another training of a network go to another file,
--training 2.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib import networks, rivals
from benchmarks.lib.bn_statistics import Compressor, renormalised
from benchmarks.lib.catalogue import LIMITS, comparison
from benchmarks.lib.rivals import CalibrationImages
from benchmarks.lib.tables import Row, options, publish, recorded
from ghostify import GhostifyError, Policy, Recipe, Rule, finetune, fit, rewrite, trace
from ghostify.data.training_data import TrainingData
from ghostify.evaluation.metrics import predict
from ghostify.fitting.sensitivity import prepare_calibration
from ghostify.planning.cost import count_macs
from ghostify.search.budget import plan_for_budget
from ghostify.timing.latency import interleaved_latency
from ghostify.training.losses import distillation_loss

IMAGES, DISTILLED, HOLDOUT, TIMED, PAGES = 512, 10_000, 500, 32, 128
SEEDS = (0, 1, 2)
RECIPE = Recipe(epochs=1, batch=128, precision="bf16", evaluate_every=1, save_every=10_000)
RATES = (0.02, 0.005)
SAME = 0.011  # one image of 10,000, and rounding


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network, the calibration images of a seed, and the score of a model in percent."""

    model: nn.Module
    calibration: Callable[[int], CalibrationImages]
    example: Tensor
    evaluate: Callable[[nn.Module], float]
    training_data: Callable[[int], TrainingData] | None = None
    ignore: tuple[Any, ...] = ()


Limit = tuple[str, float]
Method = Callable[[Subject, CalibrationImages, Limit, int], nn.Module | None]


def ghosts(
    settings: Mapping[str, Any], subject: Subject, calibration: CalibrationImages, limit: Limit, seed: int
) -> nn.Module | None:
    """As `ghostify(model, budget=..., calibration=..., **settings)`."""
    program = trace(subject.model, subject.example)
    prepared = prepare_calibration(program, calibration.batches, seed)
    try:
        ghost_plan = plan_for_budget(program, _policy(subject, **settings), dict([limit]), prepared, seed)
    except GhostifyError:
        return None
    return rewrite(program, ghost_plan, fit(program, ghost_plan, prepared, seed=seed).weights)


def untrained(
    keep_filters: bool, subject: Subject, calibration: CalibrationImages, limit: Limit, seed: int
) -> nn.Module | None:
    """The paper's module, depthwise 3 x 3, not fitted: first filters kept, or all weights random."""
    program = trace(subject.model, subject.example)
    try:
        ghost_plan = plan_for_budget(program, _policy(subject), dict([limit]), seed=seed)
    except GhostifyError:
        return None
    module = networks.untrained_ghosts(program, ghost_plan, seed, keep_filters=keep_filters)
    return networks.reestimated(module, calibration.batches)


def compressed(
    search: Compressor,
    final: Compressor,
    subject: Subject,
    calibration: CalibrationImages,
    limit: Limit,
    _: int,
) -> nn.Module | None:
    """Another method's model, by `final` at the ratio that `search`, a faster form of it, finds."""
    key, share = limit
    costs = {"macs": partial(_macs, subject), "latency": partial(_time, subject)}
    ratio = rivals.smallest_ratio(search(subject.model, calibration), costs[key], share)
    if ratio is None:
        return None
    return final(subject.model, calibration)(ratio)


METHODS: dict[str, Method] = {
    "ghostify, auto and narrow": partial(ghosts, {"cheap": "auto", "prune": True}),
    "ghostify, auto": partial(ghosts, {"cheap": "auto"}),
    "ghostify, depthwise": partial(ghosts, {}),
    "ghost, first filters kept": partial(untrained, True),
    "ghost, random": partial(untrained, False),
    "Torch-Pruning, magnitude": partial(compressed, rivals.by_magnitude, renormalised(rivals.by_magnitude)),
    "Torch-Pruning, Taylor": partial(compressed, rivals.by_taylor, renormalised(rivals.by_taylor)),
    "channels, least squares": partial(compressed, rivals.by_magnitude, rivals.by_least_squares),
    "low rank": partial(compressed, rivals.low_rank, renormalised(rivals.low_rank)),
    "Tucker": partial(compressed, partial(rivals.tucker, approximate=True), renormalised(rivals.tucker)),
    "network decoupling": partial(compressed, rivals.decoupled, renormalised(rivals.decoupled)),
}


def _policy(subject: Subject, **settings: Any) -> Policy:
    return Policy((Rule(ignore=subject.ignore, **settings),))


def _macs(subject: Subject, small: nn.Module) -> float:
    return count_macs(small, subject.example) / count_macs(subject.model, subject.example)


def _time(subject: Subject, small: nn.Module) -> float:
    before, after = interleaved_latency([subject.model, small], subject.example)
    return after / before


def fashion(name: str) -> Subject:
    """A network trained on Fashion-MNIST."""
    data = networks.images()
    model = networks.NETWORKS[name](data)

    def shuffled_indices(seed: int) -> Tensor:
        return torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))

    def calibration(seed: int) -> CalibrationImages:
        index = shuffled_indices(seed)[:IMAGES]
        return CalibrationImages(data.train[index].split(64), data.train_labels[index].split(64))

    def training_data(seed: int) -> TrainingData:
        student_images, holdout = shuffled_indices(seed)[IMAGES:][: DISTILLED + HOLDOUT].split([DISTILLED, HOLDOUT])
        datasets = (TensorDataset(data.train[k], torch.full((len(k),), -1)) for k in (student_images, holdout))
        return TrainingData(*datasets, labelled=False)

    return Subject(model, calibration, data.train[:TIMED], lambda m: networks.accuracy(m, data), training_data)


def craft() -> Subject:
    """EasyOCR's detector, evaluated by the original's boxes."""
    from benchmarks.lib.craft import agreement, has_few_outputs, score_maps
    from benchmarks.lib.craft import craft as detector
    from benchmarks.lib.documents import calibration_pages, test_pages

    model, pages = detector(), test_pages(24, 320, 0)
    reference = score_maps(model, pages)

    def calibration(seed: int) -> CalibrationImages:
        return CalibrationImages(calibration_pages(PAGES, 256, seed).split(8))

    def evaluate(small: nn.Module) -> float:
        return agreement(score_maps(small, pages), reference)["f1"]

    return Subject(model, calibration, calibration(0).first, evaluate, ignore=(has_few_outputs,))


def rows(
    subject: Subject,
    previous_rows: list[Row],
    seeds: Sequence[int] = SEEDS,
    *,
    untimed: bool = False,
    only: Sequence[str] = ("",),
    limits: Sequence[Limit] = LIMITS,
) -> Iterator[Row]:
    best = subject.evaluate(subject.model)
    if any(row["how"] == "original" and abs(row["score"] - best) > SAME for row in previous_rows):
        sys.exit(f"the network's score {best:.2f} is not the recorded one. Choose another --training.")
    yield from previous_rows
    finished = {row["how"] for row in previous_rows}
    if "original" not in finished:
        yield {"how": "original", "score": best, "macs": 1.0, "latency": 1.0}
    for seed in seeds:
        calibration, timed = subject.calibration(seed), seed == SEEDS[0] and not untimed
        for limit in limits:
            if limit[0] == "latency" and not timed:
                continue
            for name, method in METHODS.items():
                how = f"{name}, {limit[0]} {limit[1]:g}, seed {seed}"
                if (
                    how in finished
                    or not any(text in name for text in only)
                    or (not calibration.labels and "Taylor" in name)
                ):
                    continue
                small = method(subject, calibration, limit, seed)
                if small is None:
                    continue
                facts = {"method": name, "limit": list(limit), "seed": seed, "score": subject.evaluate(small)}
                costs = {"macs": _macs(subject, small), "latency": _time(subject, small) if timed else None}
                distilled = None if subject.training_data is None else _score_after_distillation(subject, small, seed)
                yield {"how": how, **facts, **costs, "taught": distilled}


def _score_after_distillation(subject: Subject, small: nn.Module, seed: int) -> float:
    """The score after distillation, at the learning rate with the smaller loss on the holdout images."""
    assert subject.training_data is not None
    training_data, students = subject.training_data(seed), []
    for rate in RATES:
        with tempfile.TemporaryDirectory() as folder:
            recipe = replace(RECIPE, learning_rate=rate, seed=seed)
            students.append(finetune(small, subject.model, training_data, folder, recipe))
    images = torch.stack([image for image, _ in training_data.validation]).split(100)
    reference = predict(subject.model, images)
    return subject.evaluate(min(students, key=lambda m: float(distillation_loss(predict(m, images), reference))))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--network", choices=[*networks.NETWORKS, "craft"], default="resnet20")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--only", nargs="+", default=[""], help="methods with one of these in their names")
    keys = list(dict.fromkeys(key for key, _ in LIMITS))
    parser.add_argument("--limits", nargs="+", choices=keys, default=keys, help="limited costs")
    parser.add_argument("--training", type=int, default=1, help="which training of the network this is")
    parser.add_argument("--untimed", action="store_true", help="multiply-accumulates alone, for a busy machine")
    parser.add_argument("--summary", action="store_true", help="only show the means of the result file")
    arguments = parser.parse_args()
    name = f"compare-{arguments.network}" + (f"-{arguments.training}" if arguments.training > 1 else "")
    previous_rows = recorded(name)
    if arguments.summary:
        print(comparison(previous_rows))
        return
    limits = [limit for limit in LIMITS if limit[0] in arguments.limits]
    subject = craft() if arguments.network == "craft" else fashion(arguments.network)
    publish(
        name,
        rows(subject, previous_rows, arguments.seeds, untimed=arguments.untimed, only=arguments.only, limits=limits),
        comparison,
        images=IMAGES if subject.training_data else PAGES,
        taught=DISTILLED if subject.training_data else 0,
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
