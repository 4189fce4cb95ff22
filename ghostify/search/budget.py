"""From a budget to a plan: a search space of candidates, its exact solution, and its revision by measured costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ghostify import skip_reasons
from ghostify.arguments import a_function, a_mapping, a_number, a_seed, optional, public
from ghostify.errors import GhostifyError, InfeasibleBudgetError
from ghostify.evaluation.output_comparison import OutputComparison
from ghostify.fitting.initialization import untrained_weights
from ghostify.fitting.output_scale import Importance
from ghostify.fitting.sensitivity import PreparedCalibration, a_calibration, prepare_optional
from ghostify.graph.program import Program, a_program
from ghostify.modules.layout import GhostLayout
from ghostify.planning.planner import (
    Plan,
    PlanTarget,
    Skip,
    build_plan,
    why_not_at_ratio,
)
from ghostify.planning.policy import Policy, Rule, as_policy
from ghostify.rewriting.apply import rewrite
from ghostify.runtimes.registry import a_runtime
from ghostify.search.costs import COSTS
from ghostify.search.forecast import describe_expectation, forecast_of, keeps_answers
from ghostify.search.measured_losses import MeasuredLosses
from ghostify.search.model_changes import change_of_plan
from ghostify.search.search_space import SearchSpace, build_search_space
from ghostify.search.solver import GAP, choose_candidates
from ghostify.search.untouched import find_untouched
from ghostify.timing.timer import LatencyTimer
from ghostify.user_warnings import warn_user

MAX_REVISIONS = 6
MAX_ROUNDS = 4
MEASURED_GAP = 0.01  # of losses that are measured on some tens of images
LARGER_BUDGETS = (0.4, 0.7)  # as shares of the way from a budget to the original's costs
MEASURED_SLACK = 1.01


@dataclass(frozen=True)
class BudgetPlan:
    """A plan, its shares of the original's costs, and the output error that it is predicted to add: of the simulated
    plan, or without images a sum over layers.

    `picks` are the numbers of the chosen candidates; `simulated` compares the outputs of the simulated plan.
    """

    plan: Plan
    shares: Mapping[str, float]
    loss: float
    picks: tuple[int, ...] = ()
    simulated: OutputComparison | None = None


def a_budget(name: str, value: Any) -> dict[str, float]:
    """A mapping of limits by cost, and max_drop; a check of arguments."""
    limits: Mapping[str, float] = a_mapping("Pass {'macs': 0.5} to halve the multiply-accumulates.")(name, value)
    if not limits:
        raise GhostifyError(f"{name}: is empty. Use {{'macs': 0.5}} to halve the multiply-accumulates.")
    for key in limits:
        if key not in COSTS and key != "max_drop":
            raise GhostifyError(f"{name} {key!r}: is unknown. Use {', '.join(COSTS)} or max_drop.")
    positive = a_number(0, above=True, problem="is not a positive number", remedy="Use 0.5 for half.")
    at_least_0 = a_number(0, problem="is not a number of at least 0", remedy="Use 0.5 for half a point.")
    return {
        key: (at_least_0 if key == "max_drop" else positive)(f"{name} {key}", limit) for key, limit in limits.items()
    }


@public(
    program=a_program,
    policy=as_policy,
    budget=a_budget,
    calibration=optional(a_calibration),
    seed=a_seed,
    runtime=a_runtime,
    importance=optional(a_function("outputs")),
)
def plan_for_budget(
    program: Program,
    policy: Policy | Rule,
    budget: Mapping[str, float],
    calibration: Iterable[Any] | PreparedCalibration | None = None,
    seed: int = 0,
    runtime: str = "eager",
    importance: Importance | None = None,
) -> Plan:
    """The plan under `policy` within `budget` with the smallest error of the model's outputs: measured by simulation
    where there is a calibration, else predicted. Warns where the model's answers are not expected to stay.

    `budget` limits "macs", "params" and "latency", alone or together: as a share of the original's if at most 1, else
    as a number, of milliseconds for one forward of the example inputs. A rule's ratio holds for its layers, and the
    rest is planned around them; rules without a ratio leave it to the budget. Latencies are those of the inference form
    in `runtime` (see `ghostify`), layer by layer, measured on this machine (see `timing.latency`); with a latency
    budget, layers that do not get faster are not rewritten, except at the ratio of their rule. `importance` is that of
    `ghostify`. `program` needs shapes. Raises `InfeasibleBudgetError`, with the minimum, where no plan meets it.
    """
    check_budget(budget)
    rules = as_policy("policy", policy)
    if importance is not None:
        calibration = prepare_optional(program, calibration, seed, importance)
    with LatencyTimer(runtime) as timer:
        space = build_search_space(program, rules, tuple(budget), calibration, seed, timer)
        selected = select_plan(space, budget)
        forecast = _forecast_of(space, selected)
        _warn_of_lost_answers(space, budget, forecast)
        return replace(selected.plan, forecast=forecast)


def _forecast_of(space: SearchSpace, selected: BudgetPlan) -> OutputComparison | None:
    if space.measured is None:
        return None
    simulator = space.measured.simulator
    return forecast_of(space.program, selected.plan, simulator.calibration, simulator.seed)


def _warn_of_lost_answers(space: SearchSpace, budget: Mapping[str, float], forecast: OutputComparison | None) -> None:
    """Warn where the model's answers are not expected to stay, with the smallest larger budget tried at which they are,
    or the largest."""
    if forecast is None or keeps_answers(forecast):
        return
    text = ", ".join(f"{key} {limit:g}" for key, limit in budget.items())
    message = f"budget {text}: expect {describe_expectation(forecast)}."
    are_counted = all(limit < 1 and not COSTS[key].is_measured for key, limit in budget.items())
    for step in LARGER_BUDGETS if are_counted else ():
        larger = {key: round(limit + step * (1 - limit), 3) for key, limit in budget.items()}
        alternative = _forecast_of(space, select_plan(space, larger))
        if alternative is not None and (keeps_answers(alternative) or step == LARGER_BUDGETS[-1]):
            text = ", ".join(f"{limit:g}" for limit in larger.values())
            message = f"{message} With {text}: {describe_expectation(alternative)}."
            break
    warn_user(message)


def check_budget(budget: Mapping[str, float]) -> None:
    """Raises `GhostifyError` for a budget that limits no cost, or the drop, for which a plan alone does not suffice."""
    if "max_drop" in a_budget("budget", budget):
        raise GhostifyError(
            "budget max_drop: needs fitted models. Use `ghostify convert` with --validation, or "
            "ghostify(..., evaluate=...)."
        )


def select_plan(space: SearchSpace, budget: Mapping[str, float]) -> BudgetPlan:
    """The plan of least predicted error within `budget`, whose keys are among those of the space's costs.

    Under a measured cost the complete model is measured as well, and the plan is revised where the sum over its layers
    was too optimistic. Raises `InfeasibleBudgetError`.
    """
    names = tuple(space.totals)
    given = [(budget.get(key, math.inf), total) for key, total in space.totals.items()]
    limits = [value * total if value <= 1 else float(value) for value, total in given]
    measured = [k for k, key in enumerate(names) if key in budget and COSTS[key].is_measured]
    goals = {k: limits[k] / space.totals[names[k]] for k in measured}
    tightened, shares = list(limits), dict.fromkeys(measured, math.inf)
    for _ in range(MAX_REVISIONS):
        selected = _solve(space, tightened)
        if selected is None and tightened == limits:
            _raise_infeasible(space, budget, limits)
        if selected is None:
            break
        shares = _measured_shares(space, selected.plan, measured)
        if all(shares[k] <= goals[k] * MEASURED_SLACK for k in measured):
            return replace(
                selected,
                plan=replace(selected.plan, macs_limit=int(limits[names.index("macs")]) if "macs" in budget else None),
                shares={**selected.shares, **{names[k]: shares[k] for k in measured}},
            )
        for k in (k for k in measured if shares[k] > goals[k] * MEASURED_SLACK):
            tightened[k] *= goals[k] / shares[k]
    worst = max(measured, key=lambda k: shares[k] / goals[k])
    raise InfeasibleBudgetError(
        f"budget {names[worst]} {budget[names[worst]]:g}: is infeasible: the per-layer sum meets it, the "
        f"complete model takes {shares[worst]:.3f} of the original's {names[worst]}. Raise it, or target more layers."
    )


def _solve(space: SearchSpace, limits: Sequence[float]) -> BudgetPlan | None:
    """The plan of least error whose sums over layers keep within `limits`, or None.

    With calibration images, the losses of the chosen candidates are measured and the choice is repeated, up to
    `MAX_ROUNDS` times. Of the choices, that whose simulated plan has the least error as a whole is taken.
    """
    measured, choices = space.measured, list[BudgetPlan]()
    rounds, gap = (1, GAP) if measured is None else (MAX_ROUNDS, MEASURED_GAP)
    for _ in range(rounds):
        candidates = space.candidates if measured is None else measured.corrected(space.candidates)
        remaining = [limit - rest for limit, rest in zip(limits, space.fixed, strict=True)]
        try:
            picks = choose_candidates(candidates, remaining, space.constraints, gap)
        except GhostifyError:
            if choices:  # the solver takes too long for another one
                break
            raise
        if picks is None:
            return None
        chosen = _plan_of(space, picks)
        if measured is None:
            return chosen
        if any(chosen.picks == former.picks for former in choices):
            break
        choices.append(chosen)
        if not measured.measure({key: space.change_of(*key) for key in enumerate(picks)}):
            break
    assert measured is not None
    return _best_choice(space, measured, choices)


def _best_choice(space: SearchSpace, measured: MeasuredLosses, choices: Sequence[BudgetPlan]) -> BudgetPlan:
    """The choice with the least error as a whole, and that error as its loss; the last one where none is known."""
    changes = [change_of_plan(choice.plan, space.assignments(choice.picks)) for choice in choices]
    comparisons = measured.simulator.compare(changes)
    errors = [math.inf if comparison is None else comparison.error for comparison in comparisons]
    best = min(range(len(choices)), key=lambda k: (errors[k], -k))
    simulated, choice = comparisons[best], choices[best]
    loss = choice.loss if simulated is None else simulated.error
    return replace(choice, loss=loss, plan=replace(choice.plan, measurements=len(measured.losses)), simulated=simulated)


def _plan_of(space: SearchSpace, picks: Sequence[int]) -> BudgetPlan:
    """The plan of one candidate of each list, with the sums of costs and of predicted losses."""
    picked = [candidates[pick] for candidates, pick in zip(space.candidates, picks, strict=True)]
    layers = space.layers
    layouts = {t.conv.name: c.layout for t, c in zip(layers, picked[: len(layers)], strict=True)}
    of_groups = zip(space.groups, picked[space.first_group :], strict=True)
    kept = {group: candidate.kept for group, candidate in of_groups if candidate.kept is not None}
    sums = [rest + sum(c.costs[k] for c in picked) for k, rest in enumerate(space.fixed)]
    decisions = [_with_layout(t, layouts) for t in space.targets]
    plan = build_plan(space.program, decisions, kept)
    notes = (*space.notes, *map(str, find_untouched(space.program, plan.skips)))
    return BudgetPlan(
        replace(plan, notes=notes),
        {key: of_plan / total for (key, total), of_plan in zip(space.totals.items(), sums, strict=True)},
        sum(c.loss for c in picked),
        tuple(picks),
    )


def _with_layout(
    target: PlanTarget | Skip, layouts: Mapping[str, GhostLayout | None]
) -> tuple[PlanTarget, GhostLayout] | Skip:
    if isinstance(target, Skip):
        return target
    layout = layouts[target.conv.name]
    if layout is not None:
        return target, layout
    has_ratio = target.rule.ratio is not None
    return Skip(target.conv, why_not_at_ratio(target.rule, target.conv) if has_ratio else skip_reasons.NOT_NEEDED)


def _measured_shares(space: SearchSpace, plan: Plan, measured: Sequence[int]) -> dict[int, float]:
    """The complete model's shares of the measured costs under a plan: sums over layers may be too optimistic."""
    if not measured:
        return {}
    program, names = space.program, tuple(space.totals)
    module = rewrite(program, plan, untrained_weights(program, plan, shuffled=True))
    return {k: COSTS[names[k]].share_of_model(program, module, space.timer) for k in measured}


def _raise_infeasible(space: SearchSpace, budget: Mapping[str, float], limits: Sequence[float]) -> NoReturn:
    for (key, minimum), limit in zip(space.minimum_shares.items(), limits, strict=True):
        if minimum * space.totals[key] > limit:
            share = math.ceil(1000 * minimum) / 1000
            raise InfeasibleBudgetError(
                f"budget {key} {budget[key]:g}: is infeasible: the minimum is {share:g} of the original's. "
                f"Raise it to at least {share:g}, or target more layers.{_what_else(space)}"
            )
    minima = ", ".join(f"{key} {math.ceil(1000 * minimum) / 1000:g}" for key, minimum in space.minimum_shares.items())
    raise InfeasibleBudgetError(
        f"budget: its limits are infeasible together; the minimum of each, whatever the others, is {minima} of the "
        "original's. Raise one of them, or target more layers."
    )


def _what_else(space: SearchSpace) -> str:
    """What the budget cannot touch, as the end of a message: what most would be saved by, first."""
    members = {member.conv.name for group in space.groups for member in group.members}
    skips = [t for t in space.targets if isinstance(t, Skip) and t.conv.name not in members]
    allowed = [untouched for untouched in find_untouched(space.program, skips) if untouched.gain]
    return f" The {max(allowed, key=lambda u: u.gain)}." if allowed else ""
