"""The difference between two models' outputs on calibration images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ghostify.evaluation.output_comparison import OutputComparison, OutputSums
from ghostify.fitting.chosen_images import ChosenImages, ImageChoice, choose_images, holdout_images
from ghostify.fitting.distributed import all_reduce_sum
from ghostify.fitting.output_scale import Importance, counted_tensors
from ghostify.fitting.sensitivity import PreparedCalibration
from ghostify.graph.batches import run_batch
from ghostify.graph.modes import eval_mode


def compare_outputs(
    original: nn.Module, converted: nn.Module, calibration: PreparedCalibration, choice: ImageChoice | None = None
) -> OutputComparison | None:
    """The outputs of `converted` against those of `original` on the chosen images (default: the holdout).

    Over all processes. None where the outputs have no values that correspond. Raises `GhostifyError` where a model does
    not run.
    """
    batches, scale, sums = calibration.batches, calibration.output_scale, OutputSums()
    if not scale.deviations:
        return None
    for images in choose_images(batches, holdout_images(batches.images) if choice is None else choice):
        expected, outputs = (outputs_of(model, images, scale.importance) for model in (original, converted))
        sums.add(outputs, expected, scale.deviations, images.size)
    return OutputSums(all_reduce_sum(sums.values)[0]).comparison()


def outputs_of(module: nn.Module, images: ChosenImages, importance: Importance | None = None) -> list[Tensor]:
    """The outputs of a forward that count, for the chosen images, in evaluation mode."""
    with eval_mode(module):
        return chosen_outputs(run_batch(module, images.inputs, images.number), images, importance)


def chosen_outputs(outputs: Any, images: ChosenImages, importance: Importance | None = None) -> list[Tensor]:
    """The tensors of a model's outputs that count, for the chosen images."""
    return [images.of(o) for o in counted_tensors(outputs, importance)]
