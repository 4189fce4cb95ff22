"""The forecast of a plan: a fit to a part of the images, tested on others, and a warning where it loses answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from ghostify.evaluation.output_comparison import OutputComparison
from ghostify.fitting.chosen_images import even_images, odd_images, selected_batches
from ghostify.fitting.driver import fit_weights
from ghostify.fitting.output_errors import compare_outputs
from ghostify.fitting.sensitivity import PreparedCalibration, prepare_calibration
from ghostify.graph.program import Program
from ghostify.planning.planner import Plan
from ghostify.rewriting.apply import rewrite
from ghostify.user_warnings import warn_user

MAX_FITTED_IMAGES, MAX_TESTED_IMAGES = 128, 64
MIN_AGREEMENT = 90.0
MAX_ERROR = 0.1


def with_forecast(
    program: Program, plan: Plan, calibration: Iterable[Any] | PreparedCalibration, seed: int = 0
) -> Plan:
    """The plan with its forecast; warns where it is expected to lose the model's answers."""
    forecast = forecast_of(program, plan, prepare_calibration(program, calibration, seed), seed)
    if forecast is not None and not keeps_answers(forecast):
        warn_user(f"plan: expect {describe_expectation(forecast)}. Use a smaller ratio, or a budget.")
    return replace(plan, forecast=forecast)


def forecast_of(
    program: Program, plan: Plan, calibration: PreparedCalibration, seed: int = 0
) -> OutputComparison | None:
    """The outputs of the plan, fitted to some images of even numbers, on some of odd numbers.

    None for a plan that changes nothing, for a single image, and where the outputs have no values that correspond.
    """
    images = calibration.batches.images
    tested = odd_images(images, MAX_TESTED_IMAGES)
    if not plan.changes or not tested(torch.arange(images)).any():
        return None
    some = replace(calibration, batches=selected_batches(calibration.batches, even_images(images, MAX_FITTED_IMAGES)))
    converted = rewrite(program, plan, fit_weights(program, plan, some, seed))
    return compare_outputs(program.module, converted, calibration, tested)


def keeps_answers(forecast: OutputComparison | None) -> bool:
    """Whether a conversion is expected to leave `MIN_AGREEMENT` percent of the answers as they are; of outputs without
    classes, whether their error is at most `MAX_ERROR`."""
    if forecast is None:
        return True
    return forecast.error <= MAX_ERROR if forecast.agreement is None else forecast.agreement >= MIN_AGREEMENT


def describe_expectation(forecast: OutputComparison) -> str:
    """What a forecast lets expect, as a phrase."""
    if forecast.agreement is None:
        return f"an output error of about {forecast.error:.2g}"
    return f"about {forecast.agreement:.0f} % of the model's answers unchanged (output error {forecast.error:.2g})"
