"""From a budget to per-layer layouts: candidates with their cost and the error they would cause, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ghostify.errors import GhostifyError, InfeasibleBudgetError
from ghostify.fitting.initialization import untrained_weights
from ghostify.fitting.sensitivity import Calibration, prepare_calibration
from ghostify.graph.program import Program
from ghostify.modules.layout import GhostLayout
from ghostify.planning import cost, skip_reasons
from ghostify.planning.planner import Plan, PlanTarget, Skip, build_plan, may_prune, resolve_targets
from ghostify.planning.policy import Policy
from ghostify.pruning.pruning_groups import PruningGroup, Unprunable, find_pruning_groups
from ghostify.rewriting.apply import rewrite
from ghostify.search.candidates import Candidate, group_candidates, layer_candidates
from ghostify.search.group_statistics import compute_group_statistics
from ghostify.search.layer_statistics import compute_layer_statistics
from ghostify.search.solver import GroupConstraint, choose_candidates
from ghostify.timing.latency import interleaved_latency, model_latency
from ghostify.timing.timer import LatencyTimer

REVISIONS = 6
SHOWN = 5
LATENCY_SLACK = 1.01
COSTS = ("macs", "params", "latency")


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """What may become of each convolution that a rule targets, then of each link, and what the whole model costs, by
    the budget's names.

    `fixed` is what costs that no choice is about; `targets` every convolution's target, or why it stays. By the
    `constraints`, a convolution makes, or reads, as many maps as its link keeps. `notes` go to the plan.
    """

    program: Program
    targets: tuple[PlanTarget | Skip, ...]
    candidates: tuple[list[Candidate], ...]
    totals: Mapping[str, float]
    timer: LatencyTimer
    groups: tuple[PruningGroup, ...] = ()
    constraints: tuple[GroupConstraint, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fixed(self) -> list[float]:
        own = [sum(candidates[0].costs[k] for candidates in self.candidates) for k in range(len(self.totals))]
        return [total - spent for total, spent in zip(self.totals.values(), own, strict=True)]

    @property
    def minimum_shares(self) -> dict[str, float]:
        """The least share of each cost that the layers reach, each on its own."""
        least = [self._least(k) for k in range(len(self.totals))]
        both = zip(self.totals.items(), least, self.fixed, strict=True)
        return {key: (spent + rest) / total for (key, total), spent, rest in both}

    def _least(self, k: int) -> float:
        """The least sum of one cost."""
        if not self.constraints:
            return sum(min(c.costs[k] for c in candidates) for candidates in self.candidates)
        priced = [[replace(c, loss=c.costs[k]) for c in candidates] for candidates in self.candidates]
        picks = choose_candidates(priced, [math.inf] * len(self.totals), self.constraints)
        assert picks is not None
        return sum(candidates[pick].loss for candidates, pick in zip(priced, picks, strict=True))


@dataclass(frozen=True)
class BudgetPlan:
    """A plan, its shares of the original's costs, and the error of the outputs that it is expected to add."""

    plan: Plan
    shares: Mapping[str, float]
    loss: float


def plan_for_budget(
    program: Program,
    policy: Policy,
    budget: Mapping[str, float],
    calibration: Iterable[Any] | Calibration | None = None,
    seed: int = 0,
    runtime: str = "eager",
) -> Plan:
    """The plan under `policy` that keeps within `budget` with the least expected error of the model's outputs.

    `budget` limits "macs", "params" and "latency", alone or together: as a share of the original's if at most 1, else
    as a number, of milliseconds for one forward of the example inputs. It takes the place of the rules' ratios.
    Latencies are those of the inference form in `runtime` (see `ghostify`), layer by layer, measured on this machine
    (see `measure`); with one, no layer is rewritten that does not get faster. `program` needs shapes. Raises
    `GhostifyError` for a budget out of reach, saying what is within reach.
    """
    check_budget(budget)
    with LatencyTimer(runtime) as clock:
        return select_plan(build_search_space(program, policy, tuple(budget), calibration, seed, clock), budget).plan


def check_budget(budget: Mapping[str, float]) -> None:
    """Raises `GhostifyError` for limits that mean nothing."""
    if not budget:
        raise GhostifyError("the budget is empty: use {'macs': 0.5} to halve the multiply-accumulates")
    for key, value in budget.items():
        if key == "max_drop":
            raise GhostifyError("budget max_drop is judged on fitted models: use ghostify(..., evaluate=...)")
        if key not in COSTS:
            raise GhostifyError(f"budget {key!r} is unknown: known are {', '.join(COSTS)} and max_drop")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise GhostifyError(f"budget {key}={value!r} is not a positive number")


def build_search_space(
    program: Program,
    policy: Policy,
    keys: tuple[str, ...],
    calibration: Iterable[Any] | Calibration | None,
    seed: int,
    clock: LatencyTimer,
) -> SearchSpace:
    """For each convolution the layouts worth their costs, which are those named by `keys`."""
    if program.macs is None:
        raise GhostifyError("a budget needs to know the model's shapes: pass example_inputs")
    if any(isinstance(rule.cheap, int) for rule in policy.rules):
        raise GhostifyError("a budget chooses how wide the ghosts see: use cheap 'auto', 'depthwise' or 'pointwise'")
    narrow = any(rule.prune for rule in policy.rules)
    if narrow and calibration is None:
        raise GhostifyError("narrow looks at what maps predict of each other: pass calibration, unlabelled images")
    targets = resolve_targets(program, policy)
    wished = [t for t in targets if isinstance(t, PlanTarget)]
    totals = {key: _total(program, key, clock) for key in keys}
    seen = None if calibration is None else prepare_calibration(program, calibration, seed)
    groups, unprunable = _prunable_groups(program, policy, wished) if narrow else ([], [])
    thinnings = [] if seen is None else compute_group_statistics(program, groups, seen, seed)
    numbers, ties, links = (
        {t.conv.name: k for k, t in enumerate(wished)},
        list[GroupConstraint](),
        list[list[Candidate]](),
    )
    for link, thinning in enumerate(thinnings, len(wished)):
        own = [m for m in thinning.group.members if m.conv.name in numbers]
        others = [m for m in thinning.group.members if m not in own]
        links.append(group_candidates(program, thinning, others, keys, clock))
        ties += [GroupConstraint(numbers[m.conv.name], link, "kept_out_count") for m in own if m.prunes_outputs]
        ties += [GroupConstraint(numbers[m.conv.name], link, "kept_in_count") for m in own if m.prunes_inputs]
    candidates = []
    for k, (target, profile) in enumerate(
        zip(wished, compute_layer_statistics(program, wished, seen, seed), strict=True)
    ):
        made, read = (
            [c.kept for t in ties if (t.conv, t.key) == (k, key) for c in links[t.group - len(wished)] if c.kept]
            for key in ("kept_out_count", "kept_in_count")
        )
        candidates.append(layer_candidates(program, target, profile, keys, clock, made, [len(kept) for kept in read]))
    lines = tuple(thinning.group for thinning in thinnings)
    notes = (_why_unpruned(groups, unprunable),) if narrow and not thinnings else ()
    return SearchSpace(program, tuple(targets), (*candidates, *links), totals, clock, lines, tuple(ties), notes)


def _prunable_groups(
    program: Program, policy: Policy, wished: list[PlanTarget]
) -> tuple[list[PruningGroup], list[Unprunable]]:
    """Channel groups whose convolutions may all lose channels, and the others with their reasons."""
    names, groups, unprunable = {target.conv.name for target in wished}, list[PruningGroup](), list[Unprunable]()
    for group in find_pruning_groups(program):
        if isinstance(group, Unprunable):
            unprunable.append(group)
            continue
        kept = [conv for conv in group.dense if conv.name not in names]
        kept += [member.conv for member in group.members if not may_prune(program, policy, member.conv)]
        if kept:
            unprunable.append(Unprunable(group.members[0].conv.name, f"no rule lets {kept[0].name} lose channels"))
        else:
            groups.append(group)
    return groups, unprunable


def _why_unpruned(groups: list[PruningGroup], unprunable: list[Unprunable]) -> str:
    """Why no channel group is pruned, by the first groups."""
    unreached = [Unprunable(g.members[0].conv.name, "no calibration image reaches all that read them") for g in groups]
    reasons = [f"channels of {own.name}: {own.reason}" for own in (*unreached, *unprunable)]
    more = [f"and {len(reasons) - SHOWN} more"] if len(reasons) > SHOWN else []
    return "; ".join(["no channel group can be pruned", *reasons[:SHOWN], *more])


def select_plan(choices: SearchSpace, budget: Mapping[str, float]) -> BudgetPlan:
    """The choice of least loss within `budget`, whose keys are among those of the choices' costs.

    With a latency, the whole model is timed as well, and the choice revised where its layers do not add up.
    """
    wished = [(budget.get(key, math.inf), total) for key, total in choices.totals.items()]
    limits = [value * total if value <= 1 else float(value) for value, total in wished]
    asked, share = list(limits), math.inf
    for _ in range(REVISIONS):
        made = _within(choices, asked)
        if made is None and asked == limits:
            _out_of_reach(choices, budget, limits)
        if made is None:
            break
        if "latency" not in budget:
            return made
        k = tuple(choices.totals).index("latency")
        share, goal = _share_of_time(choices, made.plan), limits[k] / choices.totals["latency"]
        if share <= goal * LATENCY_SLACK:
            return replace(made, shares={**made.shares, "latency": share})
        asked[k] *= goal / share
    raise InfeasibleBudgetError(
        f"budget latency={budget['latency']:g} is out of reach: its layers promise it, but the whole model takes "
        f"{share:.3f} of the original's time"
    )


def _within(choices: SearchSpace, limits: list[float]) -> BudgetPlan | None:
    rest = choices.fixed
    picks = choose_candidates(
        choices.candidates, [limit - own for limit, own in zip(limits, rest, strict=True)], choices.constraints
    )
    if picks is None:
        return None
    picked = [candidates[pick] for candidates, pick in zip(choices.candidates, picks, strict=True)]
    wished = [t for t in choices.targets if isinstance(t, PlanTarget)]
    layouts = {t.conv.name: c.layout for t, c in zip(wished, picked[: len(wished)], strict=True)}
    thin = zip(choices.groups, picked[len(wished) :], strict=True)
    kept = {link: c.kept for link, c in thin if c.kept is not None}
    spent = [own + sum(c.costs[k] for c in picked) for k, own in enumerate(rest)]
    decided = [_decided(t, layouts) for t in choices.targets]
    return BudgetPlan(
        replace(build_plan(choices.program, decided, kept), notes=choices.notes),
        {key: own / total for (key, total), own in zip(choices.totals.items(), spent, strict=True)},
        sum(c.loss for c in picked),
    )


def _share_of_time(choices: SearchSpace, plan: Plan) -> float:
    """How long the whole model takes under a plan, in parts of the original's time: layers may not add up."""
    program = choices.program
    made = rewrite(program, plan, untrained_weights(program, plan, shuffled=True))
    before, after = interleaved_latency([program.module, made], program.example, choices.timer)
    return after / before


def _total(program: Program, key: str, clock: LatencyTimer) -> float:
    """What the whole model costs."""
    if key == "latency":
        return model_latency(program, clock)
    return float((program.macs or 0) if key == "macs" else cost.count_parameters(program.module))


def _out_of_reach(choices: SearchSpace, budget: Mapping[str, float], limits: list[float]) -> NoReturn:
    for (key, least), limit in zip(choices.minimum_shares.items(), limits, strict=True):
        if least * choices.totals[key] > limit:
            share = math.ceil(1000 * least) / 1000
            raise InfeasibleBudgetError(
                f"budget {key}={budget[key]:g} is out of reach: these rules reach {share:g} at the least"
            )
    raise InfeasibleBudgetError("the budgets are out of reach together: relax one of them")


def _decided(
    target: PlanTarget | Skip, layouts: dict[str, GhostLayout | None]
) -> tuple[PlanTarget, GhostLayout] | Skip:
    if isinstance(target, Skip):
        return target
    layout = layouts[target.conv.name]
    return Skip(target.conv, skip_reasons.NOT_NEEDED) if layout is None else (target, layout)
