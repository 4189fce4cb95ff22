"""The forecast of a plan: its simulation on calibration images, and a warning where it loses the model's answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ghostify.evaluation.output_comparison import OutputComparison
from ghostify.fitting.assignment import GhostAssignment
from ghostify.fitting.sensitivity import PreparedCalibration, prepare_calibration
from ghostify.graph.program import Program
from ghostify.modules.layout import Pointwise
from ghostify.planning.planner import GhostRewrite, Plan, PlanTarget
from ghostify.planning.policy import Rule
from ghostify.search.layer_statistics import compute_layer_statistics
from ghostify.search.loss_estimator import LossEstimator
from ghostify.search.model_changes import change_of_plan
from ghostify.search.simulation import Simulator
from ghostify.user_warnings import warn_user

MIN_AGREEMENT = 90.0
MAX_ERROR = 0.1


def with_forecast(
    program: Program, plan: Plan, calibration: Iterable[Any] | PreparedCalibration, seed: int = 0
) -> Plan:
    """The plan with the output error and the agreement that its simulation measures on calibration images.

    The plan itself where it has a forecast, or changes nothing. Warns where it is expected to lose the model's answers.
    """
    if plan.forecast is not None or not plan.changes:
        return plan
    prepared = prepare_calibration(program, calibration, seed)
    assigned = [e for e in plan.rewrites if not isinstance(e.layout.form, Pointwise)]
    assignments = _assignments(program, assigned, prepared, seed)
    (forecast,) = Simulator(program, prepared, seed).compare([change_of_plan(plan, assignments)])
    if forecast is not None and not keeps_answers(forecast):
        warn_user(f"plan: expect {describe_expectation(forecast)}. Use a smaller ratio, or a budget.")
    return replace(plan, forecast=forecast)


def _assignments(
    program: Program, entries: Sequence[GhostRewrite], calibration: PreparedCalibration, seed: int
) -> dict[str, GhostAssignment]:
    """The assignments of ghosts to the maps that they are computed from."""
    targets = [PlanTarget(e.conv, Rule(cheap="depthwise", dw_size=e.layout.kernel_size)) for e in entries]
    assignments = {}
    for entry, statistics in zip(entries, compute_layer_statistics(program, targets, calibration, seed), strict=True):
        assignment = LossEstimator(statistics, entry.layout.kernel_size).assignment(entry.layout)
        if assignment is not None:
            assignments[entry.conv.name] = assignment
    return assignments


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
