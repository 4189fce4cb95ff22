"""What each step of the fit is worth: the same conversion with one step left out, or done in another way.

    python benchmarks/ablation.py

ResNet-20 of width 32 on Fashion-MNIST (networks.py), ratio 2, depthwise d = 3, every dense convolution but the first,
512 unlabelled training images (seed 0), no training. "layer error" is the mean over layers of the relative error on the
calibration images that only judge; "logit error" and top-1 are on all 10,000 test images. Adam stands for a gradient
method on the same local error as the joint refit, 200 steps a layer from the same start. Results go to
benchmarks/results/ablation.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import torch
from accuracy import calibration
from networks import images, reestimated, resnet20
from tables import Row, options, publish
from torch import Tensor, nn

from ghostify import Policy, Rule, fit, plan, rewrite, trace
from ghostify.data.datasets import Images
from ghostify.evaluate import outputs, relative_error, top1
from ghostify.fitting import lstsq
from ghostify.fitting.assign import Groups, in_given_order
from ghostify.fitting.ghost_statistics import Solution
from ghostify.fitting.lstsq import Statistics
from ghostify.fitting.moments import Pair
from ghostify.fitting.sensitivity import Calibration, calibrate
from ghostify.fitting.starts import unfitted
from ghostify.ghost import Layout
from ghostify.planning.plan import Plan, Rewrite

IMAGES = 512
ADAM_STEPS = 200
Patches = dict[str, Callable[..., object]]


def original_filters(_moments: Pair, prior: Tensor, *_: object, **__: object) -> Tensor:
    """In place of the dense prediction from the layer's present inputs."""
    return prior


def given_order(_costs: Tensor, layout: Layout) -> Groups:
    """In place of the choice of pairs."""
    return in_given_order(layout)


def no_joint_refit(_stats: Statistics, solution: Solution, _weights: Tensor) -> Solution:
    return solution


def by_adam(stats: Statistics, solution: Solution, weights: Tensor) -> Solution:
    """The joint refit by gradients, from the same start; the rate falls by a cosine."""
    with torch.enable_grad():
        intrinsic = solution.intrinsic.clone().requires_grad_()
        kernels = solution.kernels.clone().requires_grad_()
        sizes = [float(p.detach().square().mean().sqrt()) for p in (intrinsic, kernels)]
        groups = [{"params": [p], "lr": 0.02 * s} for p, s in zip((intrinsic, kernels), sizes, strict=True)]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ADAM_STEPS)
        now = replace(solution, intrinsic=intrinsic, kernels=kernels)
        for _ in range(ADAM_STEPS):
            optimizer.zero_grad()
            loss = (weights * stats.squared_errors(now)).sum()
            (loss / loss.detach()).backward()
            optimizer.step()
            schedule.step()
    return replace(solution, intrinsic=intrinsic.detach(), kernels=kernels.detach())


def unaware(seen: Calibration) -> Calibration:
    """Channels count by gamma^2 / sigma^2 of the norm behind, not by what the outputs feel."""
    return replace(seen, felt={})


def alone(decided: Plan) -> Plan:
    """Nobody makes good what the other summand lacks."""
    return replace(
        decided, entries=tuple(replace(e, partner=None) if isinstance(e, Rewrite) else e for e in decided.entries)
    )


WAYS: list[tuple[str, Patches]] = [
    ("all of it", {}),
    ("filters stay the original's", {"dense_prediction": original_filters}),
    ("pairs in the given order", {"choose_groups": given_order}),
    ("no joint refit", {"_alternate": no_joint_refit}),
    (f"joint refit by {ADAM_STEPS} steps of Adam", {"_alternate": by_adam}),
]


def rows(model: nn.Module, data: Images) -> Iterator[Row]:
    """One row for each way."""
    program = trace(model, data.test[:1])
    decided = plan(program, Policy((Rule(ratio=2),)))
    batches = list(calibration(data, IMAGES, 0).split(64))
    seen = calibrate(program, batches, 0)
    test = data.test.to(memory_format=torch.channels_last).split(500)
    reference = outputs(model, test)

    def row(how: str, module: nn.Module, seconds: float = 0.0, layer_error: float | None = None) -> Row:
        made = outputs(module.to(memory_format=torch.channels_last), test)
        error, top = relative_error(made, reference), top1(made, data.test_labels)
        return {"how": how, "layer": layer_error, "error": error, "top1": top, "seconds": seconds}

    def converted(how: str, decided: Plan, seen: Calibration, patches: Patches) -> Row:
        started = time.perf_counter()
        with ExitStack() as stack:
            for name, stand_in in patches.items():
                stack.enter_context(patch.object(lstsq, name, stand_in))
            found = fit(program, decided, seen)
        errors = [float(w.held_out.mean()) for w in found.weights.values() if w.held_out is not None]
        spent = time.perf_counter() - started
        return row(how, rewrite(program, decided, found.weights), spent, sum(errors) / len(errors))

    yield row("original", model)
    yield row("random kernels, first filters kept", rewrite(program, decided, unfitted(program, decided)))
    yield row("no images", rewrite(program, decided, fit(program, decided).weights))
    for how, patches in WAYS:
        yield converted(how, decided, seen, patches)
    yield converted("summands are not made good", alone(decided), seen, {})
    yield converted("channels count by the norm behind", decided, unaware(seen), {})
    yield converted("ghosts may read activated maps", plan(program, Policy((Rule(activated=True),))), seen, {})
    whole = rewrite(program, decided, fit(program, decided, seen).weights)
    yield row("all of it, BatchNorm re-estimated after", reestimated(whole, batches))


COLUMNS = {
    "layer error": lambda row: "" if row["layer"] is None else f"{row['layer']:.4f}",
    "logit error": lambda row: f"{row['error']:.4f}",
    "top-1 %": lambda row: f"{row['top1']:.2f}",
    "fit s": lambda row: f"{row['seconds']:.1f}",
}


def main() -> None:
    options(__doc__).parse_args()
    data = images()
    publish("ablation", "ResNet-20, ratio 2, depthwise d = 3; no training", COLUMNS, rows(resnet20(data), data))


if __name__ == "__main__":
    main()
