"""The difference between two models' outputs on calibration images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ghostify.evaluation.output_comparison import OutputComparison, OutputSums
from ghostify.fitting.calibration import CalibrationBatches
from ghostify.fitting.chosen_images import ChosenImages, ImageChoice, choose_images, holdout_images
from ghostify.fitting.distributed import all_reduce_sum
from ghostify.fitting.sensitivity import first_images, output_deviations
from ghostify.graph.batches import run_batch
from ghostify.graph.inputs import tensor_leaves
from ghostify.graph.modes import eval_mode

DEVIATION_IMAGES = 64


def compare_outputs(
    original: nn.Module, converted: nn.Module, batches: CalibrationBatches, choice: ImageChoice | None = None
) -> OutputComparison | None:
    """The outputs of `converted` against those of `original` on the chosen images (default: the holdout).

    Over all processes. None where the outputs have no values that correspond. Raises `GhostifyError` where a model does
    not run.
    """
    deviations, sums = calibrated_deviations(original, batches), OutputSums()
    if not deviations:
        return None
    for images in choose_images(batches, holdout_images(batches.images) if choice is None else choice):
        expected, outputs = (outputs_of(model, images) for model in (original, converted))
        sums.add(outputs, expected, deviations, images.size)
    return OutputSums(all_reduce_sum(sums.values)[0]).comparison()


def calibrated_deviations(module: nn.Module, batches: CalibrationBatches) -> list[Tensor]:
    """The deviations of the outputs with fractions, on the first images: what their errors are relative to."""
    with eval_mode(module):
        return output_deviations(module, first_images(batches, min(batches.images, DEVIATION_IMAGES)))


def outputs_of(module: nn.Module, images: ChosenImages) -> list[Tensor]:
    """The outputs of a forward with fractions, for the chosen images, in evaluation mode."""
    with eval_mode(module):
        return fractional_outputs(run_batch(module, images.inputs, images.number), images)


def fractional_outputs(outputs: Any, images: ChosenImages) -> list[Tensor]:
    """The tensors with fractions among a model's outputs, for the chosen images."""
    return [images.of(o) for o in tensor_leaves(outputs) if o.is_floating_point()]
