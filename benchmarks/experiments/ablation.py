"""Ablation of the fit: the same conversion with one step left out, or replaced.

    python benchmarks/experiments/ablation.py

ResNet-20 of width 32 on Fashion-MNIST (networks.py), ratio 2, depthwise d = 3, every dense convolution but the first,
512 unlabelled training images (seed 0), no training. "layer error" is the mean over layers of the relative error on
the holdout images; "logit error" and top-1 are on all 10,000 test images. Adam minimises the
same local error as the joint refit, in 200 steps a layer from the same start. Results go to
benchmarks/results/ablation.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.networks import calibration, images, reestimated, resnet20
from benchmarks.lib.tables import Row, options, publish
from ghostify import Policy, Rule, fit, plan, rewrite, trace
from ghostify.data.datasets import LabelledImages
from ghostify.evaluation.metrics import predict, relative_error, top1
from ghostify.fitting.assignment import GhostAssignment, paper_assignment
from ghostify.fitting.ghost_statistics import Solution
from ghostify.fitting.initialization import untrained_weights
from ghostify.fitting.lstsq import DEFAULT_METHOD, FitMethod, JointStatistics
from ghostify.fitting.moments import SplitMoments
from ghostify.fitting.sensitivity import PreparedCalibration, prepare_calibration
from ghostify.modules.layout import GhostLayout
from ghostify.planning.planner import GhostRewrite, Plan

IMAGES = 512
ADAM_STEPS = 200


def original_filters(_moments: SplitMoments, prior: Tensor, *_: object, **__: object) -> Tensor:
    """No refit: each layer keeps the original's filters."""
    return prior


def given_order(_costs: Tensor, layout: GhostLayout) -> GhostAssignment:
    """The paper's assignment: the first maps are intrinsic."""
    return paper_assignment(layout)


def no_joint_refit(_stats: JointStatistics, solution: Solution, _weights: Tensor) -> Solution:
    return solution


def by_adam(stats: JointStatistics, solution: Solution, weights: Tensor) -> Solution:
    """The joint refit by gradients, from the same start; the rate falls by a cosine."""
    with torch.enable_grad():
        intrinsic = solution.intrinsic.clone().requires_grad_()
        kernels = solution.kernels.clone().requires_grad_()
        sizes = [float(p.detach().square().mean().sqrt()) for p in (intrinsic, kernels)]
        groups = [{"params": [p], "lr": 0.02 * s} for p, s in zip((intrinsic, kernels), sizes, strict=True)]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ADAM_STEPS)
        current = replace(solution, intrinsic=intrinsic, kernels=kernels)
        for _ in range(ADAM_STEPS):
            optimizer.zero_grad()
            loss = (weights * stats.squared_errors(current)).sum()
            (loss / loss.detach()).backward()
            optimizer.step()
            schedule.step()
    return replace(solution, intrinsic=intrinsic.detach(), kernels=kernels.detach())


def without_sensitivity(calibrated: PreparedCalibration) -> PreparedCalibration:
    """Channels are weighted by gamma^2 / sigma^2 of the following norm, not by the outputs' sensitivity."""
    return replace(calibrated, sensitivity={})


def without_residual_correction(ghost_plan: Plan) -> Plan:
    """No layer corrects the error of the residual operand."""
    return replace(
        ghost_plan,
        entries=tuple(
            replace(e, residual_operand=None) if isinstance(e, GhostRewrite) else e for e in ghost_plan.entries
        ),
    )


METHODS = {
    "all steps": FitMethod(),
    "filters stay the original's": FitMethod(refit_filters=original_filters),
    "pairs in the given order": FitMethod(assign_ghosts=given_order),
    "no joint refit": FitMethod(refit_jointly=no_joint_refit),
    f"joint refit by {ADAM_STEPS} steps of Adam": FitMethod(refit_jointly=by_adam),
}


def rows(model: nn.Module, data: LabelledImages) -> Iterator[Row]:
    """One row for each variant of the fit."""
    program = trace(model, data.test[:1])
    ghost_plan = plan(program, Policy((Rule(ratio=2),)))
    batches = list(calibration(data, IMAGES, 0).split(64))
    calibrated = prepare_calibration(program, batches, 0)
    test = data.test.to(memory_format=torch.channels_last).split(500)
    reference = predict(model, test)

    def row(how: str, module: nn.Module, seconds: float = 0.0, layer_error: float | None = None) -> Row:
        outputs = predict(module.to(memory_format=torch.channels_last), test)
        error, top = relative_error(outputs, reference), top1(outputs, data.test_labels)
        return {"how": how, "layer": layer_error, "error": error, "top1": top, "seconds": seconds}

    def converted(
        how: str, ghost_plan: Plan, calibrated: PreparedCalibration, method: FitMethod = DEFAULT_METHOD
    ) -> Row:
        started = time.perf_counter()
        fits = fit(program, ghost_plan, calibrated, method=method)
        errors = [float(w.holdout_error.mean()) for w in fits.weights.values() if w.holdout_error is not None]
        seconds = time.perf_counter() - started
        return row(how, rewrite(program, ghost_plan, fits.weights), seconds, sum(errors) / len(errors))

    yield row("original", model)
    yield row(
        "random kernels, first filters kept", rewrite(program, ghost_plan, untrained_weights(program, ghost_plan))
    )
    yield row("no images", rewrite(program, ghost_plan, fit(program, ghost_plan).weights))
    for how, method in METHODS.items():
        yield converted(how, ghost_plan, calibrated, method)
    yield converted(
        "the residual operand's error is not corrected", without_residual_correction(ghost_plan), calibrated
    )
    yield converted("channels weighted by the following norm", ghost_plan, without_sensitivity(calibrated))
    yield converted("ghosts may read activated maps", plan(program, Policy((Rule(activated=True),))), calibrated)
    converted_model = rewrite(program, ghost_plan, fit(program, ghost_plan, calibrated).weights)
    yield row("all steps, BatchNorm re-estimated afterwards", reestimated(converted_model, batches))


def main() -> None:
    options(__doc__).parse_args()
    data = images()
    publish("ablation", rows(resnet20(data), data))


if __name__ == "__main__":
    main()
