"""From a budget to a plan: a search space of candidates, its exact solution, and its revision by measured costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ghostify import skip_reasons
from ghostify.arguments import a_mapping, a_number, a_seed, optional, public
from ghostify.errors import GhostifyError, InfeasibleBudgetError
from ghostify.fitting.initialization import untrained_weights
from ghostify.fitting.sensitivity import PreparedCalibration, a_calibration, prepare_calibration
from ghostify.graph.program import Program, a_program
from ghostify.modules.layout import GhostLayout
from ghostify.planning.planner import (
    Plan,
    PlanTarget,
    Skip,
    build_plan,
    may_prune,
    resolve_targets,
    why_not_at_ratio,
)
from ghostify.planning.policy import Policy, Rule, as_policy
from ghostify.pruning.pruning_groups import PruningGroup, Unprunable, find_pruning_groups
from ghostify.rewriting.apply import rewrite
from ghostify.runtimes.registry import a_runtime
from ghostify.search.candidate_lists import group_lists, layer_lists
from ghostify.search.candidates import Candidate
from ghostify.search.costs import COSTS
from ghostify.search.group_statistics import compute_group_statistics
from ghostify.search.solver import Constraint, choose_candidates
from ghostify.timing.timer import LatencyTimer

MAX_REVISIONS = 6
MAX_REASONS = 5
MEASURED_SLACK = 1.01


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """The candidates of each targeted convolution, then of each linear layer that groups prune, then of each channel
    group; `totals` are the original's costs, and `original_costs` the part of them that each list of candidates
    replaces.

    `targets` holds every convolution: its target, or why it is skipped. By `constraints`, the outputs or inputs of a
    layer are as many as its groups keep. `notes` go to the plan.
    """

    program: Program
    targets: tuple[PlanTarget | Skip, ...]
    candidates: tuple[list[Candidate], ...]
    totals: Mapping[str, float]
    original_costs: tuple[tuple[float, ...], ...]
    timer: LatencyTimer
    groups: tuple[PruningGroup, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fixed(self) -> list[float]:
        """The costs of everything that has no candidates."""
        searched = [sum(costs[k] for costs in self.original_costs) for k in range(len(self.totals))]
        return [total - part for total, part in zip(self.totals.values(), searched, strict=True)]

    @property
    def minimum_shares(self) -> dict[str, float]:
        """The minimum share of each cost, whatever the other costs."""
        minima = [self._minimum(k) for k in range(len(self.totals))]
        rows = zip(self.totals.items(), minima, self.fixed, strict=True)
        return {key: (minimum + fixed) / total for (key, total), minimum, fixed in rows}

    def _minimum(self, k: int) -> float:
        """The minimum sum of one cost over the candidates."""
        if not self.constraints:
            return sum(min(c.costs[k] for c in candidates) for candidates in self.candidates)
        priced = [[replace(c, loss=c.costs[k]) for c in candidates] for candidates in self.candidates]
        picks = choose_candidates(priced, [math.inf] * len(self.totals), self.constraints)
        assert picks is not None
        return sum(candidates[pick].loss for candidates, pick in zip(priced, picks, strict=True))


@dataclass(frozen=True)
class BudgetPlan:
    """A plan, its shares of the original's costs, and the output error that it is predicted to add."""

    plan: Plan
    shares: Mapping[str, float]
    loss: float


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
)
def plan_for_budget(
    program: Program,
    policy: Policy | Rule,
    budget: Mapping[str, float],
    calibration: Iterable[Any] | PreparedCalibration | None = None,
    seed: int = 0,
    runtime: str = "eager",
) -> Plan:
    """The plan under `policy` within `budget` that has the smallest predicted error of the model's outputs.

    `budget` limits "macs", "params" and "latency", alone or together: as a share of the original's if at most 1, else
    as a number, of milliseconds for one forward of the example inputs. A rule's ratio holds for its layers, and the
    rest is planned around them; rules without a ratio leave it to the budget. Latencies are those of the inference form
    in `runtime` (see `ghostify`), layer by layer, measured on this machine (see `timing.latency`); with a latency
    budget, layers that do not get faster are not rewritten, except at the ratio of their rule. `program` needs shapes.
    Raises `InfeasibleBudgetError`, with the minimum, for a budget that no plan meets.
    """
    check_budget(budget)
    rules = as_policy("policy", policy)
    with LatencyTimer(runtime) as timer:
        return select_plan(build_search_space(program, rules, tuple(budget), calibration, seed, timer), budget).plan


def check_budget(budget: Mapping[str, float]) -> None:
    """Raises `GhostifyError` for a budget that limits no cost, or the drop, for which a plan alone does not suffice."""
    if "max_drop" in a_budget("budget", budget):
        raise GhostifyError(
            "budget max_drop: needs fitted models. Use `ghostify convert` with --validation, or "
            "ghostify(..., evaluate=...)."
        )


def build_search_space(
    program: Program,
    policy: Policy,
    keys: tuple[str, ...],
    calibration: Iterable[Any] | PreparedCalibration | None,
    seed: int,
    timer: LatencyTimer,
) -> SearchSpace:
    """The candidates of all targets, and of channel groups where rules allow pruning, with the costs named by `keys`.

    Raises `GhostifyError` where the program has no shapes, or pruning no calibration images.
    """
    prunes = any(rule.prune for rule in policy.rules)
    if program.macs is None:
        raise GhostifyError("budget: needs the model's shapes. Pass example_inputs.")
    for rule in policy.rules:
        if isinstance(rule.cheap, int) and rule.ratio is None:
            raise GhostifyError(
                f"cheap {rule.cheap}: does not work with a budget. Use auto, depthwise or pointwise, or give its rule "
                "a ratio."
            )
    if prunes and calibration is None:
        raise GhostifyError("prune: needs calibration images. Pass calibration (--calibration FOLDER).")
    decisions = resolve_targets(program, policy)
    targets = [t for t in decisions if isinstance(t, PlanTarget)]
    totals = {key: COSTS[key].of_program(program, timer) for key in keys}
    prepared = None if calibration is None else prepare_calibration(program, calibration, seed)
    groups, unprunable = _prunable_groups(program, policy, targets) if prunes else ([], [])
    group_statistics = [] if prepared is None else compute_group_statistics(program, groups, prepared, seed)
    members = {member.conv for statistics in group_statistics for member in statistics.group.members}
    layers = [*(target.conv for target in targets), *(layer for layer in program.linear_layers if layer in members)]
    of_groups, constraints = group_lists(program, layers, group_statistics, keys, timer)
    of_layers = layer_lists(program, targets, layers, of_groups, constraints, prepared, seed, keys, timer)
    pruned_groups = tuple(statistics.group for statistics in group_statistics)
    notes = (_why_unpruned(groups, unprunable),) if prunes and not group_statistics else ()
    original_costs = tuple(candidates[0].costs for candidates in (*of_layers, *of_groups))
    of_targets = map(_without_dense, targets, of_layers)
    lists = (*of_targets, *of_layers[len(targets) :], *of_groups)
    agreements = tuple(constraints.values())
    return SearchSpace(
        program, tuple(decisions), lists, totals, original_costs, timer, pruned_groups, agreements, notes
    )


def _without_dense(target: PlanTarget, candidates: list[Candidate]) -> list[Candidate]:
    """The candidates with ghosts where the rule has a ratio that leaves any, else all."""
    with_ghosts = [c for c in candidates if c.layout is not None]
    return with_ghosts if target.rule.ratio is not None and with_ghosts else candidates


def _prunable_groups(
    program: Program, policy: Policy, targets: Sequence[PlanTarget]
) -> tuple[list[PruningGroup], list[Unprunable]]:
    """Channel groups whose convolutions may all lose channels, and the other groups with their reasons."""
    names = {conv.name for conv in (*(target.conv for target in targets), *program.linear_layers)}
    ratios = {target.conv.name: target.rule.ratio for target in targets}
    groups, unprunable = list[PruningGroup](), list[Unprunable]()
    for group in find_pruning_groups(program):
        if isinstance(group, Unprunable):
            unprunable.append(group)
            continue
        fixed = [conv for conv in group.dense if conv.name not in names]
        fixed += [member.conv for member in group.members if not may_prune(program, policy, member.conv)]
        partial = [m.conv for m in group.members if m.prunes_outputs and m.conv.outputs != group.size]
        fixed += [conv for conv in partial if ratios.get(conv.name) is not None]
        if fixed:
            reason = skip_reasons.not_prunable(fixed[0].name)
            unprunable.append(Unprunable(group.members[0].conv.name, reason))
        else:
            groups.append(group)
    return groups, unprunable


def _why_unpruned(groups: Sequence[PruningGroup], unprunable: Sequence[Unprunable]) -> str:
    """Why no channel group is pruned, by the first groups."""
    unreached = [Unprunable(g.members[0].conv.name, skip_reasons.CONSUMERS_NOT_REACHED) for g in groups]
    reasons = [f"channels of {group.name}: {group.reason}" for group in (*unreached, *unprunable)]
    more = [f"and {len(reasons) - MAX_REASONS} more"] if len(reasons) > MAX_REASONS else []
    return "; ".join([skip_reasons.NO_GROUP_PRUNED, *reasons[:MAX_REASONS], *more])


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
            return BudgetPlan(
                replace(selected.plan, macs_limit=int(limits[names.index("macs")]) if "macs" in budget else None),
                {**selected.shares, **{names[k]: shares[k] for k in measured}},
                selected.loss,
            )
        for k in (k for k in measured if shares[k] > goals[k] * MEASURED_SLACK):
            tightened[k] *= goals[k] / shares[k]
    worst = max(measured, key=lambda k: shares[k] / goals[k])
    raise InfeasibleBudgetError(
        f"budget {names[worst]} {budget[names[worst]]:g}: is infeasible: the per-layer sum meets it, the "
        f"complete model takes {shares[worst]:.3f} of the original's {names[worst]}. Raise it, or target more layers."
    )


def _solve(space: SearchSpace, limits: Sequence[float]) -> BudgetPlan | None:
    """The plan of least predicted error whose sums over layers keep within `limits`, or None."""
    fixed = space.fixed
    remaining = [limit - rest for limit, rest in zip(limits, fixed, strict=True)]
    picks = choose_candidates(space.candidates, remaining, space.constraints)
    if picks is None:
        return None
    picked = [candidates[pick] for candidates, pick in zip(space.candidates, picks, strict=True)]
    targets = [t for t in space.targets if isinstance(t, PlanTarget)]
    layouts = {t.conv.name: c.layout for t, c in zip(targets, picked[: len(targets)], strict=True)}
    of_groups = zip(space.groups, picked[len(picked) - len(space.groups) :], strict=True)
    kept = {group: candidate.kept for group, candidate in of_groups if candidate.kept is not None}
    sums = [rest + sum(c.costs[k] for c in picked) for k, rest in enumerate(fixed)]
    decisions = [_with_layout(t, layouts) for t in space.targets]
    return BudgetPlan(
        replace(build_plan(space.program, decisions, kept), notes=space.notes),
        {key: of_plan / total for (key, total), of_plan in zip(space.totals.items(), sums, strict=True)},
        sum(c.loss for c in picked),
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
                f"Raise it to at least {share:g}, or target more layers."
            )
    minima = ", ".join(f"{key} {math.ceil(1000 * minimum) / 1000:g}" for key, minimum in space.minimum_shares.items())
    raise InfeasibleBudgetError(
        f"budget: its limits are infeasible together; the minimum of each, whatever the others, is {minima} of the "
        "original's. Raise one of them, or target more layers."
    )
