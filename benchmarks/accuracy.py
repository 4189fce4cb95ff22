"""Accuracy without training: what converting leaves of a trained network's top-1.

    python benchmarks/accuracy.py --quick     ResNet-20 of width 32 on Fashion-MNIST
    python benchmarks/accuracy.py             the same with more settings

The network is trained here on the 60,000 training images (seed 0, once, then cached). Calibration takes unlabelled
training images, picked by seed; no label and no gradient step is used. Top-1 is on all 10,000 test images, which
nothing else sees. Results go to benchmarks/results/accuracy.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
from networks import accuracy, images, resnet20
from tables import Row, publish
from torch import Tensor, fx, nn

from ghostify import Policy, Rule, fit, plan, rewrite, trace
from ghostify.assign import in_given_order
from ghostify.budget import plan_within
from ghostify.cost import count_macs
from ghostify.demo import Images
from ghostify.lstsq import GhostWeights
from ghostify.plan import Plan
from ghostify.trace import Program

QUICK: list[tuple[str, Rule, float | None]] = [
    ("ratio 2, depthwise d=3", Rule(ratio=2), None),
    ("ratio 2, pointwise", Rule(ratio=2, cheap="pointwise"), None),
    ("auto, half the MACs", Rule(cheap="auto"), 0.5),
    ("auto, a quarter of the MACs", Rule(cheap="auto"), 0.25),
]
FORMS = [
    *QUICK,
    ("ratio 2, depthwise d=1", Rule(ratio=2, dw_size=1), None),
    ("ratio 2, depthwise d=5", Rule(ratio=2, dw_size=5), None),
    ("ratio 4, depthwise d=3", Rule(ratio=4), None),
    ("ratio 4, pointwise", Rule(ratio=4, cheap="pointwise"), None),
]


def random_ghosts(program: Program, decided: Plan, seed: int = 0) -> fx.GraphModule:
    """What others start from: the first m filters kept, cheap kernels at random (Kaiming), in the given order."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for entry in decided.rewrites:
        conv, layout = program.conv(entry.conv.name), entry.layout
        d, m = layout.dw_size, layout.intrinsic
        kernels = (
            torch.randn(layout.ghosts, layout.width, d, d, generator=generator) * (2 / (layout.width * d * d)) ** 0.5
        )
        weights[entry.conv.name] = GhostWeights(
            in_given_order(layout).channels, conv.weight.detach()[:m], None, kernels, None
        )
    return rewrite(program, decided, weights)


def rows(model: nn.Module, data: Images, quick: bool) -> Iterator[Row]:
    """One row for each way of converting."""
    first = data.test[:1]
    program = trace(model, first)
    base = accuracy(model, data)
    yield {"how": "original", "top1": base, "drop": 0.0, "macs": count_macs(model, first), "seconds": 0.0, "images": 0}

    def row(how: str, module: nn.Module, seconds: float = 0.0, used: int = 0) -> Row:
        top = accuracy(module, data)
        return {
            "how": how,
            "top1": top,
            "drop": base - top,
            "macs": count_macs(module, first),
            "seconds": seconds,
            "images": used,
        }

    seeds = (0,) if quick else (0, 1, 2)
    for name, rule, budget in FORMS if not quick else QUICK:
        policy = Policy((rule,))
        if budget is None:
            decided = plan(program, policy)
            if rule == Rule(ratio=2):
                yield row(f"{name}, random ghosts", random_ghosts(program, decided))
            free = fit(program, decided)
            yield row(f"{name}, no images", rewrite(program, decided, free.weights), sum(free.seconds.values()))
        for seed in seeds:
            started, batches = time.perf_counter(), calibration(data, 512, seed).split(64)
            if budget is not None:
                decided = plan_within(program, policy, {"macs": budget}, batches, seed)
            module = rewrite(program, decided, fit(program, decided, batches, seed=seed).weights)
            yield row(f"{name}, 512 images, seed {seed}", module, time.perf_counter() - started, 512)


def calibration(data: Images, count: int, seed: int) -> Tensor:
    """Unlabelled training images."""
    return data.train[torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:count]]


COLUMNS = {
    "top-1 %": lambda row: f"{row['top1']:.2f}",
    "points lost": lambda row: f"{row['drop']:.2f}",
    "M MACs": lambda row: f"{row['macs'] / 1e6:.1f}",
    "fit s": lambda row: f"{row['seconds']:.1f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the settings of the README's table")
    arguments = parser.parse_args()
    data = images()
    model = resnet20(data)
    publish(
        "accuracy",
        "ResNet-20 w32, Fashion-MNIST, all dense convolutions but the first; no training",
        COLUMNS,
        rows(model, data, arguments.quick),
        command="python benchmarks/accuracy.py" + " --quick" * arguments.quick,
    )


if __name__ == "__main__":
    main()
