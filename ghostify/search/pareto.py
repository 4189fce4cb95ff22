"""The error-cost frontier, from the original model to the minimum cost; and the cheapest plan for a permitted drop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from ghostify.arguments import a_choice, a_function, a_number, a_seed, an_integer, call_function, optional, public
from ghostify.errors import GhostifyError, InfeasibleBudgetError
from ghostify.files import read_json
from ghostify.fitting.driver import FitResult, ProgressCallback, fit
from ghostify.fitting.output_scale import Importance
from ghostify.fitting.sensitivity import PreparedCalibration, a_calibration, prepare_optional
from ghostify.graph.program import Program, a_program
from ghostify.io.atomic import write_text_atomic
from ghostify.io.output import writing_to
from ghostify.neutral_context import caller_modes
from ghostify.planning.planner import Plan
from ghostify.planning.policy import Policy, Rule, as_policy
from ghostify.rewriting.apply import rewrite
from ghostify.runtimes.registry import a_runtime
from ghostify.search.budget import BudgetPlan, a_budget, select_plan
from ghostify.search.costs import COSTS
from ghostify.search.search_space import SearchSpace, build_search_space
from ghostify.text import printable
from ghostify.timing.timer import LatencyTimer

POINTS = 12
BISECTIONS = 6
SHARE_SLACK = 1e-6
FORMAT_VERSION = 2
REMEDY = "Write it again with `ghostify plan --frontier`."

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class FrontierPoint:
    """One plan of the frontier, and its shares of the original's costs: MACs, parameters and, where timed, latency.

    `error` is the squared error of the outputs relative to their variance, and `agreement` the percentage of images
    whose answer stays, both of the simulated plan (without calibration images: the sum of the layers' relative errors,
    and None). `drop` is the measured loss of an evaluation.
    """

    shares: Mapping[str, float]
    error: float
    plan: Plan
    drop: float | None = None
    agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON data; `layers` has the fields of `GhostLayout` for ghosts, and for pruned convolutions kept_out_count
        and kept_in_count (null: all)."""
        layers: dict[str, Any] = {e.conv.name: e.layout.to_dict() for e in self.plan.rewrites}
        for name, kept in self.plan.pruned.items():
            layers[name] = {**layers.get(name, {}), **_kept_counts(kept.kept_out, kept.kept_in)}
        errors = {"error": self.error, "agreement": self.agreement, "drop": self.drop}
        return {"shares": dict(self.shares), **errors, "layers": layers}


@public(
    program=a_program,
    policy=as_policy,
    key=a_choice(COSTS),
    calibration=optional(a_calibration),
    evaluate=optional(a_function("model")),
    seed=a_seed,
    runtime=a_runtime,
    points=an_integer(1),
    importance=optional(a_function("outputs")),
)
def frontier(
    program: Program,
    policy: Policy | Rule,
    key: str = "macs",
    calibration: Iterable[Any] | PreparedCalibration | None = None,
    *,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    runtime: str = "eager",
    points: int = POINTS,
    importance: Importance | None = None,
) -> list[FrontierPoint]:
    """Plans of the smallest predicted error at `points` costs, evenly spaced from the original's to the minimum.

    `key` names the cost: "macs", "params" or "latency", in `runtime`. `evaluate` scores a model, higher is better; with
    it, every plan is fitted and its drop below the original's score is measured. `importance` is that of `ghostify`.
    Raises `GhostifyError`.
    """
    rules = as_policy("policy", policy)
    prepared = prepare_optional(program, calibration, seed, importance)
    counted = [cost.name for cost in COSTS.values() if not cost.is_measured]
    original_score = None if evaluate is None else _score(evaluate, program.module)
    curve = []
    with LatencyTimer(runtime) as timer:
        space = build_search_space(program, rules, tuple(dict.fromkeys((*counted, key))), prepared, seed, timer)
        minimum = space.minimum_shares[key]
        for k in range(points):
            share = 1 - (1 - minimum) * k / max(1, points - 1)
            selected = _select_or_none(space, {key: min(1.0, share + SHARE_SLACK)})
            if selected is None:
                continue
            drop = None
            if evaluate is not None and original_score is not None:
                drop = original_score - _fit_and_evaluate(program, selected.plan, prepared, evaluate, seed)[0]
            agreement = None if selected.simulated is None else selected.simulated.agreement
            curve.append(FrontierPoint(selected.shares, selected.loss, selected.plan, drop, agreement))
    return curve


def frontier_table(curve: Sequence[FrontierPoint], title: str = "") -> Table:
    """A table of a frontier for a terminal."""
    table = Table(title=Text(printable(title)) if title else None, box=box.SIMPLE_HEAD, pad_edge=False)
    keys = [key for key in COSTS if curve and key in curve[0].shares]
    for key in keys:
        table.add_column(f"{key} %", justify="right")
    table.add_column("predicted error", justify="right")
    has_agreements = any(point.agreement is not None for point in curve)
    if has_agreements:
        table.add_column("unchanged answers %", justify="right")
    has_drops = any(point.drop is not None for point in curve)
    if has_drops:
        table.add_column("drop", justify="right")
    table.add_column("rewritten", justify="right")
    for point in curve:
        drop = [] if not has_drops else ["" if point.drop is None else f"{point.drop:.2f}"]
        shares = [f"{100 * point.shares[key]:.1f}" for key in keys]
        agreement = [] if not has_agreements else ["" if point.agreement is None else f"{point.agreement:.0f}"]
        table.add_row(*shares, f"{point.error:.4f}", *agreement, *drop, str(len(point.plan.changes)))
    return table


def plan_for_drop(
    program: Program,
    policy: Policy,
    budget: Mapping[str, float],
    evaluate: Evaluate,
    calibration: Iterable[Any] | PreparedCalibration | None = None,
    *,
    seed: int = 0,
    runtime: str = "eager",
    on_progress: ProgressCallback | None = None,
) -> tuple[Plan, FitResult]:
    """The cheapest plan, of those tried, whose `evaluate` is at most budget["max_drop"] below the original's; its fit.

    The minimized cost is the first other key of the budget, whose limit holds as well, or MACs; its share is bisected
    `BISECTIONS` times. Raises `GhostifyError` where the drop is larger at the other limits already.
    """
    limits = dict(a_budget("budget", budget))
    max_drop = limits.pop("max_drop")
    limits = limits or {"macs": 1.0}
    key = next(iter(limits))
    prepared = prepare_optional(program, calibration, seed)
    original_score = _score(evaluate, program.module)

    def evaluated(plan: Plan) -> tuple[float, tuple[Plan, FitResult]]:
        score, fits = _fit_and_evaluate(program, plan, prepared, evaluate, seed, on_progress)
        return original_score - score, (plan, fits)

    with LatencyTimer(runtime) as timer:
        space = build_search_space(program, policy, tuple(limits), prepared, seed, timer)
        drop, best = evaluated(select_plan(space, limits).plan)
        if not drop <= max_drop:
            text = ", ".join(f"{k}={v:g}" for k, v in limits.items())
            raise GhostifyError(
                f"budget max_drop {max_drop:g}: is infeasible: at {text} the drop is {drop:.3g}. "
                "Raise it, or the other limits."
            )
        high = limits[key] if limits[key] <= 1 else min(1.0, limits[key] / space.totals[key])
        low = min(space.minimum_shares[key], high)
        for _ in range(BISECTIONS):
            share = (low + high) / 2
            selected = _select_or_none(space, {**limits, key: share})
            drop, candidate = (math.inf, best) if selected is None else evaluated(selected.plan)
            if drop <= max_drop:
                best, high = candidate, share
            else:
                low = share
    return best


def is_frontier(file: Path) -> bool:
    """Whether a file is a frontier that `read_frontier` reads."""
    try:
        return bool(read_frontier(file))
    except GhostifyError:
        return False


def write_frontier(curve: Sequence[FrontierPoint], file: Path) -> None:
    """Write a frontier as JSON; raises `GhostifyError` where the file cannot be written."""
    content = {"format": FORMAT_VERSION, "points": [point.to_dict() for point in curve]}
    with writing_to(file):
        write_text_atomic(file, json.dumps(content, indent=1) + "\n")


def read_frontier(file: Path) -> list[dict[str, Any]]:
    """The points of a frontier as JSON data (see `FrontierPoint.to_dict`); also reads format 1, a list of points.

    Raises `GhostifyError` for any other file.
    """
    content = read_json(file, remedy=REMEDY)
    try:
        points: list[dict[str, Any]] = _from_format_1(content) if isinstance(content, list) else content["points"]
        if not isinstance(content, list) and content["format"] != FORMAT_VERSION:
            raise ValueError(f"format {content['format']} is unknown")
        if not points or not all(map(_is_point, points)):
            raise ValueError("it has no points, or others than of a frontier")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GhostifyError(f"{file}: is not a readable frontier ({error}). {REMEDY}") from error
    return points


def _is_point(point: Any) -> bool:
    """Whether JSON data are those of `FrontierPoint.to_dict`."""
    match point:
        case {"shares": {**shares}, "error": error, "layers": {**layers}} if shares:
            numbers = [*shares.values(), error, point.get("drop") or 0.0]
            are_numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
            return are_numbers and all(isinstance(layer, dict) for layer in layers.values())
    return False


def _from_format_1(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points of format 1, which had the kept channels themselves, as `keeps` (or `makes`) and `reads`."""
    return [{**p, "layers": {name: _from_layer_1(layer) for name, layer in p["layers"].items()}} for p in points]


def _from_layer_1(layer: Mapping[str, Any]) -> dict[str, Any]:
    kept_out, kept_in = layer.get("keeps", layer.get("makes")), layer.get("reads")
    layout = {key: value for key, value in layer.items() if key not in ("keeps", "makes", "reads")}
    return {**layout, **_kept_counts(kept_out, kept_in)} if "reads" in layer else layout


def _kept_counts(kept_out: Sequence[int] | None, kept_in: Sequence[int] | None) -> dict[str, int | None]:
    return {
        "kept_out_count": None if kept_out is None else len(kept_out),
        "kept_in_count": None if kept_in is None else len(kept_in),
    }


def _fit_and_evaluate(
    program: Program,
    plan: Plan,
    calibration: PreparedCalibration | None,
    evaluate: Evaluate,
    seed: int,
    on_progress: ProgressCallback | None = None,
) -> tuple[float, FitResult]:
    """The score of the fitted model of a plan, and its fit."""
    fits = fit(program, plan, calibration, seed=seed, on_progress=on_progress)
    return _score(evaluate, rewrite(program, plan, fits.weights)), fits


def _score(evaluate: Evaluate, model: nn.Module) -> float:
    """What `evaluate` returns for a model, called in the modes of the caller; raises `GhostifyError` for no number."""
    with caller_modes():
        value: Any = call_function("evaluate", evaluate, model)
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    check = a_number(problem="is not a score", remedy="Return a finite number, higher for a better model.")
    score: float = check("evaluate: its result", value)
    return score


def _select_or_none(space: SearchSpace, budget: Mapping[str, float]) -> BudgetPlan | None:
    """The plan within these limits, or None where they are infeasible."""
    try:
        return select_plan(space, budget)
    except InfeasibleBudgetError:
        return None
