"""The curve of plans from the model as it is to the least that its layers reach; and the point of a permitted drop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from torch import nn

from ghostify.errors import GhostifyError, InfeasibleBudgetError
from ghostify.fitting.driver import FitResult, ProgressCallback, fit
from ghostify.fitting.sensitivity import Calibration, prepare_calibration
from ghostify.graph.program import Program
from ghostify.io.atomic import write_text_atomic
from ghostify.planning.planner import Plan
from ghostify.planning.policy import Policy
from ghostify.rewriting.apply import rewrite
from ghostify.search.budget import COSTS, BudgetPlan, SearchSpace, build_search_space, check_budget, select_plan
from ghostify.timing.timer import LatencyTimer

POINTS = 12
STEPS = 6
SHARE_SLACK = 1e-6

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class FrontierPoint:
    """One plan of the curve: its shares of the original's MACs, parameters and, where timed, milliseconds.

    `error` is the squared error of the outputs that it is expected to add, relative to their variance (without
    calibration images: the sum of the layers' relative errors). `drop` is what an evaluation lost by it.
    """

    shares: Mapping[str, float]
    error: float
    plan: Plan
    drop: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings; layouts by layer, and, where maps are left out, those that are kept and read."""
        layers: dict[str, Any] = {e.conv.name: e.layout.to_dict() for e in self.plan.rewrites}
        for name, narrowing in self.plan.pruned.items():
            layers[name] = {**layers.get(name, {}), "keeps": narrowing.kept_out, "reads": narrowing.kept_in}
        return {"shares": dict(self.shares), "error": self.error, "drop": self.drop, "layers": layers}


def frontier(
    program: Program,
    policy: Policy,
    key: str = "macs",
    calibration: Iterable[Any] | Calibration | None = None,
    *,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    runtime: str = "eager",
    points: int = POINTS,
) -> list[FrontierPoint]:
    """Plans of least error at `points` costs, evenly from the original's down to the least within reach.

    `key` is the cost to go along: "macs", "params" or "latency", in `runtime`. `evaluate` tells how good a model is,
    higher being better; every plan is fitted then, and its drop against the original measured. Raises `GhostifyError`.
    """
    check_budget({key: 1.0})
    seen = None if calibration is None else prepare_calibration(program, calibration, seed)
    keys = tuple(dict.fromkeys(("macs", "params", key)))
    best = None if evaluate is None else evaluate(program.module)
    curve = []
    with LatencyTimer(runtime) as clock:
        choices = build_search_space(program, policy, keys, seen, seed, clock)
        least = choices.minimum_shares[key]
        for k in range(points):
            share = 1 - (1 - least) * k / max(1, points - 1)
            made = _at(choices, {key: min(1.0, share + SHARE_SLACK)})
            if made is None:
                continue
            drop = None
            if evaluate is not None and best is not None:
                drop = best - _fit_and_evaluate(program, made.plan, seen, evaluate, seed)[0]
            curve.append(FrontierPoint(made.shares, made.loss, made.plan, drop))
    return curve


def frontier_table(curve: Sequence[FrontierPoint], title: str = "") -> Table:
    """A table of a frontier for a terminal."""
    result = Table(title=title or None, box=box.SIMPLE_HEAD, pad_edge=False)
    keys = [key for key in COSTS if curve and key in curve[0].shares]
    for key in keys:
        result.add_column(f"{key} %", justify="right")
    result.add_column("expected error", justify="right")
    judged = any(point.drop is not None for point in curve)
    if judged:
        result.add_column("drop", justify="right")
    result.add_column("rewritten", justify="right")
    for point in curve:
        drop = [] if not judged else ["" if point.drop is None else f"{point.drop:.2f}"]
        shares = [f"{100 * point.shares[key]:.1f}" for key in keys]
        result.add_row(*shares, f"{point.error:.4f}", *drop, str(len(point.plan.changes)))
    return result


def plan_for_drop(
    program: Program,
    policy: Policy,
    budget: Mapping[str, float],
    evaluate: Evaluate,
    calibration: Iterable[Any] | Calibration | None = None,
    *,
    seed: int = 0,
    runtime: str = "eager",
    on_progress: ProgressCallback | None = None,
) -> tuple[Plan, FitResult]:
    """The cheapest plan found, and its fits, whose `evaluate` is at most budget["max_drop"] below the original's.

    What it is to be cheap in is the budget's first other key, whose limit holds as well, or MACs: halved in between
    `STEPS` times. Raises `GhostifyError` where the drop is larger at the other limits already.
    """
    allowed, others = budget["max_drop"], {k: v for k, v in budget.items() if k != "max_drop"} or {"macs": 1.0}
    check_budget(others)
    if isinstance(allowed, bool) or not isinstance(allowed, int | float) or not allowed >= 0:
        raise GhostifyError(f"budget max_drop={allowed!r} is not a number of at least 0")
    key = next(iter(others))
    seen = None if calibration is None else prepare_calibration(program, calibration, seed)
    best = evaluate(program.module)

    def fitted(plan: Plan) -> tuple[float, tuple[Plan, FitResult]]:
        score, fits = _fit_and_evaluate(program, plan, seen, evaluate, seed, on_progress)
        return best - score, (plan, fits)

    with LatencyTimer(runtime) as clock:
        choices = build_search_space(program, policy, tuple(others), seen, seed, clock)
        drop, found = fitted(select_plan(choices, others).plan)
        if drop > allowed:
            limits = ", ".join(f"{k}={v:g}" for k, v in others.items())
            raise GhostifyError(f"budget max_drop={allowed:g} is out of reach: at {limits} the drop is {drop:.3g}")
        high = others[key] if others[key] <= 1 else min(1.0, others[key] / choices.totals[key])
        low = min(choices.minimum_shares[key], high)
        for _ in range(STEPS):
            share = (low + high) / 2
            made = _at(choices, {**others, key: share})
            drop, tried = (math.inf, found) if made is None else fitted(made.plan)
            if drop <= allowed:
                found, high = tried, share
            else:
                low = share
    return found


def write_frontier(curve: Sequence[FrontierPoint], file: Path) -> None:
    """Keep a curve as JSON; raises `GhostifyError` where that cannot be written."""
    try:
        write_text_atomic(file, json.dumps([point.to_dict() for point in curve], indent=1) + "\n")
    except OSError as error:
        raise GhostifyError(f"{file}: cannot be written: {error.strerror}") from error


def read_frontier(file: Path) -> list[dict[str, Any]]:
    """A curve that `write_frontier` kept, as plain data; raises `GhostifyError` for anything else."""
    try:
        curve: list[dict[str, Any]] = json.loads(file.read_text())
        if not curve or any(not point["shares"] or "error" not in point for point in curve):
            raise ValueError("it has no points")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GhostifyError(f"{file}: is no curve of `ghostify plan --frontier`: {error}") from error
    return curve


def _fit_and_evaluate(
    program: Program,
    plan: Plan,
    seen: Calibration | None,
    evaluate: Evaluate,
    seed: int,
    on_progress: ProgressCallback | None = None,
) -> tuple[float, FitResult]:
    """How good the model is that a plan makes once it is fitted, and its fits."""
    fits = fit(program, plan, seen, seed=seed, on_progress=on_progress)
    return evaluate(rewrite(program, plan, fits.weights)), fits


def _at(choices: SearchSpace, budget: Mapping[str, float]) -> BudgetPlan | None:
    """The choice within these shares, or None where the layers promise them but the whole does not keep them."""
    try:
        return select_plan(choices, budget)
    except InfeasibleBudgetError:
        return None
