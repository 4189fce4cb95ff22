"""ghostify and other methods, at equal multiply-accumulates and at equal measured milliseconds.

    python benchmarks/experiments/compare.py --network resnet20      or resnet56, vgg16, mobilenet, craft

Fashion-MNIST: the networks are trained here on the 60,000 training images (networks.py). Every method sees the same
512 unlabelled training images, drawn by seed; only Taylor pruning also reads their labels. Each result is evaluated
without training, and after one epoch of distillation from the original on 10,000 other unlabelled training images (78
steps of 128, SGD, cosine from 0.02, and again from 0.005; the one that is nearer to the original on 500 more training
images is kept). Top-1 is on all 10,000 test images, which nothing else sees. BatchNorm's statistics are re-estimated
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
from benchmarks.lib.catalogue import LIMITS, comparison
from benchmarks.lib.tables import Row, options, publish, recorded
from ghostify import GhostifyError, Policy, Recipe, Rule, finetune, fit, rewrite, trace
from ghostify.data.training_data import TrainingData
from ghostify.evaluation.metrics import predict
from ghostify.fitting.sensitivity import prepare_calibration
from ghostify.graph.inputs import tensor_leaves
from ghostify.graph.modes import eval_mode
from ghostify.planning.cost import count_macs
from ghostify.search.budget import plan_for_budget
from ghostify.timing.latency import interleaved_latency
from ghostify.training.losses import distillation_loss

IMAGES, TAUGHT, JUDGING, TIMED, PAGES = 512, 10_000, 500, 32, 128
SEEDS = (0, 1, 2)
RECIPE = Recipe(epochs=1, batch=128, precision="bf16", evaluate_every=1, save_every=10_000)
RATES = (0.02, 0.005)
SAME = 0.011  # an image's worth


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network, what methods may look at, and how good what they make of it is, in percent."""

    model: nn.Module
    seen: Callable[[int], rivals.Seen]
    example: Tensor
    judge: Callable[[nn.Module], float]
    lessons: Callable[[int], TrainingData] | None = None
    ignore: tuple[Any, ...] = ()


Limit = tuple[str, float]
Way = Callable[[nn.Module, rivals.Seen], rivals.Cut]
Method = Callable[[Subject, rivals.Seen, Limit, int], nn.Module | None]


def ghosts(wish: Mapping[str, Any], subject: Subject, seen: rivals.Seen, limit: Limit, seed: int) -> nn.Module | None:
    """As `ghostify(model, budget=..., calibration=..., **wish)`."""
    program = trace(subject.model, subject.example)
    looked = prepare_calibration(program, seen.batches, seed)
    try:
        decided = plan_for_budget(program, _policy(subject, **wish), dict([limit]), looked, seed)
    except GhostifyError:
        return None
    return rewrite(program, decided, fit(program, decided, looked, seed=seed).weights)


def starts(kept: bool, subject: Subject, seen: rivals.Seen, limit: Limit, seed: int) -> nn.Module | None:
    """The paper's module, depthwise 3 x 3, fitted to nothing: first filters kept, or all drawn anew."""
    program = trace(subject.model, subject.example)
    try:
        decided = plan_for_budget(program, _policy(subject), dict([limit]), seed=seed)
    except GhostifyError:
        return None
    module = networks.unfitted_ghosts(program, decided, seed, kept=kept)
    return networks.reestimated(module, seen.batches)


def cut(
    search: Way,
    make: Way,
    subject: Subject,
    seen: rivals.Seen,
    limit: Limit,
    _: int,
) -> nn.Module | None:
    """A rival's, as `make` makes it, at the ratio that `search`, which is quicker, finds."""
    key, share = limit
    costs = {"macs": partial(_macs, subject), "latency": partial(_time, subject)}
    ratio = rivals.least(search(subject.model, seen), costs[key], share)
    if ratio is None:
        return None
    return make(subject.model, seen)(ratio)


def renormed(way: Way) -> Way:
    """What a way makes, with the statistics that serve it better."""
    return lambda model, seen: lambda ratio: nearer(way(model, seen)(ratio), model, seen)


def nearer(made: nn.Module, model: nn.Module, seen: rivals.Seen) -> nn.Module:
    """As it is or with statistics taken anew, whichever answers more as the original does on the calibration images."""

    def answers(m: nn.Module) -> Tensor:
        with eval_mode(m):
            return torch.cat([tensor_leaves(m(batch))[0] for batch in seen.batches])

    wanted = answers(model)
    return min(
        (networks.reestimated(made, seen.batches), made), key=lambda m: float((answers(m) - wanted).square().sum())
    )


METHODS: dict[str, Method] = {
    "ghostify, auto and narrow": partial(ghosts, {"cheap": "auto", "prune": True}),
    "ghostify, auto": partial(ghosts, {"cheap": "auto"}),
    "ghostify, depthwise": partial(ghosts, {}),
    "ghost, first filters kept": partial(starts, True),
    "ghost, random": partial(starts, False),
    "Torch-Pruning, magnitude": partial(cut, rivals.by_magnitude, renormed(rivals.by_magnitude)),
    "Torch-Pruning, Taylor": partial(cut, rivals.by_taylor, renormed(rivals.by_taylor)),
    "channels, least squares": partial(cut, rivals.by_magnitude, rivals.by_least_squares),
    "low rank": partial(cut, rivals.low_rank, renormed(rivals.low_rank)),
    "Tucker": partial(cut, partial(rivals.tucker, rough=True), renormed(rivals.tucker)),
    "network decoupling": partial(cut, rivals.decoupled, renormed(rivals.decoupled)),
}


def _policy(subject: Subject, **wish: Any) -> Policy:
    return Policy((Rule(ignore=subject.ignore, **wish),))


def _macs(subject: Subject, small: nn.Module) -> float:
    return count_macs(small, subject.example) / count_macs(subject.model, subject.example)


def _time(subject: Subject, small: nn.Module) -> float:
    before, after = interleaved_latency([subject.model, small], subject.example)
    return after / before


def fashion(name: str) -> Subject:
    """A network trained on Fashion-MNIST."""
    data = networks.images()
    model = networks.NETWORKS[name](data)

    def drawn(seed: int) -> Tensor:
        return torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))

    def seen(seed: int) -> rivals.Seen:
        index = drawn(seed)[:IMAGES]
        return rivals.Seen(data.train[index].split(64), data.train_labels[index].split(64))

    def lessons(seed: int) -> TrainingData:
        taught, judging = drawn(seed)[IMAGES:][: TAUGHT + JUDGING].split([TAUGHT, JUDGING])
        parts = (TensorDataset(data.train[k], torch.full((len(k),), -1)) for k in (taught, judging))
        return TrainingData(*parts, labelled=False)

    return Subject(model, seen, data.train[:TIMED], lambda m: networks.accuracy(m, data), lessons)


def craft() -> Subject:
    """EasyOCR's detector, judged by the original's boxes."""
    from benchmarks.lib.craft import agreement, narrow, score_maps
    from benchmarks.lib.craft import craft as detector
    from benchmarks.lib.documents import calibration_pages, test_pages

    model, pages = detector(), test_pages(24, 320, 0)
    reference = score_maps(model, pages)

    def seen(seed: int) -> rivals.Seen:
        return rivals.Seen(calibration_pages(PAGES, 256, seed).split(8))

    def judge(small: nn.Module) -> float:
        return agreement(score_maps(small, pages), reference)["f1"]

    return Subject(model, seen, seen(0).first, judge, ignore=(narrow,))


def rows(
    subject: Subject,
    known: list[Row],
    seeds: Sequence[int] = SEEDS,
    *,
    untimed: bool = False,
    only: Sequence[str] = ("",),
    limits: Sequence[Limit] = LIMITS,
) -> Iterator[Row]:
    best = subject.judge(subject.model)
    if any(row["how"] == "original" and abs(row["score"] - best) > SAME for row in known):
        sys.exit(f"the network scores {best:.2f}, the recorded one did not: begin another file by --training")
    yield from known
    done = {row["how"] for row in known}
    if "original" not in done:
        yield {"how": "original", "score": best, "macs": 1.0, "latency": 1.0}
    for seed in seeds:
        seen, timed = subject.seen(seed), seed == SEEDS[0] and not untimed
        for limit in limits:
            if limit[0] == "latency" and not timed:
                continue
            for name, method in METHODS.items():
                how = f"{name}, {limit[0]} {limit[1]:g}, seed {seed}"
                if how in done or not any(part in name for part in only) or (not seen.labels and "Taylor" in name):
                    continue
                small = method(subject, seen, limit, seed)
                if small is None:
                    continue
                facts = {"method": name, "limit": list(limit), "seed": seed, "score": subject.judge(small)}
                costs = {"macs": _macs(subject, small), "latency": _time(subject, small) if timed else None}
                taught = None if subject.lessons is None else _taught(subject, small, seed)
                yield {"how": how, **facts, **costs, "taught": taught}


def _taught(subject: Subject, small: nn.Module, seed: int) -> float:
    """How good it is once it has learnt from the original, at the rate that brings it nearer on the judging images."""
    assert subject.lessons is not None
    lessons, found = subject.lessons(seed), []
    for rate in RATES:
        with tempfile.TemporaryDirectory() as folder:
            recipe = replace(RECIPE, learning_rate=rate, seed=seed)
            found.append(finetune(small, subject.model, lessons, folder, recipe))
    images = torch.stack([image for image, _ in lessons.validation]).split(100)
    wanted = predict(subject.model, images)
    return subject.judge(min(found, key=lambda m: float(distillation_loss(predict(m, images), wanted))))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--network", choices=[*networks.NETWORKS, "craft"], default="resnet20")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--only", nargs="+", default=[""], help="methods with one of these in their names")
    keys = list(dict.fromkeys(key for key, _ in LIMITS))
    parser.add_argument("--limits", nargs="+", choices=keys, default=keys, help="what is limited")
    parser.add_argument("--training", type=int, default=1, help="which training of the network this is")
    parser.add_argument("--untimed", action="store_true", help="multiply-accumulates alone, for a machine not at rest")
    parser.add_argument("--summary", action="store_true", help="only show the means of the result file")
    arguments = parser.parse_args()
    name = f"compare-{arguments.network}" + (f"-{arguments.training}" if arguments.training > 1 else "")
    known = recorded(name)
    if arguments.summary:
        print(comparison(known))
        return
    limits = [limit for limit in LIMITS if limit[0] in arguments.limits]
    subject = craft() if arguments.network == "craft" else fashion(arguments.network)
    publish(
        name,
        rows(subject, known, arguments.seeds, untimed=arguments.untimed, only=arguments.only, limits=limits),
        comparison,
        images=IMAGES if subject.lessons else PAGES,
        taught=TAUGHT if subject.lessons else 0,
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
