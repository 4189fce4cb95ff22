"""From a budget to per-layer layouts: candidates with their cost and the error they would cause, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ghostify.errors import GhostifyError, OutOfReachError
from ghostify.fitting.initialization import unfitted
from ghostify.fitting.sensitivity import Calibration, calibrate
from ghostify.graph.program import Program
from ghostify.modules.layout import GhostLayout
from ghostify.planning import cost
from ghostify.planning.planner import Plan, Skip, Target, may_narrow, plan_layouts, targets
from ghostify.planning.policy import Policy
from ghostify.pruning.pruning_groups import PruningGroup, Unprunable, find_pruning_groups
from ghostify.rewriting.apply import rewrite
from ghostify.search.candidates import Candidate, candidates_of, thinned
from ghostify.search.group_statistics import thinnings_of
from ghostify.search.layer_statistics import profiles_of
from ghostify.search.solver import Tie, solve
from ghostify.timing.latency import model_milliseconds, paired
from ghostify.timing.timer import Stopwatch

REVISIONS = 6
SHOWN = 5
TOLERATED = 1.01
COSTS = ("macs", "params", "latency")


@dataclass(frozen=True, eq=False)
class Choices:
    """What may become of each convolution that a rule targets, then of each link, and what the whole model costs, by
    the budget's names.

    `fixed` is what costs that no choice is about; `found` every convolution's target, or why it stays. By the `ties`, a
    convolution makes, or reads, as many maps as its link keeps. `notes` go to the plan.
    """

    program: Program
    found: tuple[Target | Skip, ...]
    options: tuple[list[Candidate], ...]
    totals: Mapping[str, float]
    clock: Stopwatch
    links: tuple[PruningGroup, ...] = ()
    ties: tuple[Tie, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fixed(self) -> list[float]:
        own = [sum(options[0].costs[k] for options in self.options) for k in range(len(self.totals))]
        return [total - spent for total, spent in zip(self.totals.values(), own, strict=True)]

    @property
    def reach(self) -> dict[str, float]:
        """The least share of each cost that the layers reach, each on its own."""
        least = [self._least(k) for k in range(len(self.totals))]
        both = zip(self.totals.items(), least, self.fixed, strict=True)
        return {key: (spent + rest) / total for (key, total), spent, rest in both}

    def _least(self, k: int) -> float:
        """The least sum of one cost."""
        if not self.ties:
            return sum(min(c.costs[k] for c in options) for options in self.options)
        priced = [[replace(c, loss=c.costs[k]) for c in options] for options in self.options]
        picks = solve(priced, [math.inf] * len(self.totals), self.ties)
        assert picks is not None
        return sum(options[pick].loss for options, pick in zip(priced, picks, strict=True))


@dataclass(frozen=True)
class Choice:
    """A plan, its shares of the original's costs, and the error of the outputs that it is expected to add."""

    plan: Plan
    shares: Mapping[str, float]
    loss: float


def plan_within(
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
    check(budget)
    with Stopwatch(runtime) as clock:
        return choose(choices_of(program, policy, tuple(budget), calibration, seed, clock), budget).plan


def check(budget: Mapping[str, float]) -> None:
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


def choices_of(
    program: Program,
    policy: Policy,
    keys: tuple[str, ...],
    calibration: Iterable[Any] | Calibration | None,
    seed: int,
    clock: Stopwatch,
) -> Choices:
    """For each convolution the layouts worth their costs, which are those named by `keys`."""
    if program.macs is None:
        raise GhostifyError("a budget needs to know the model's shapes: pass example_inputs")
    if any(isinstance(rule.cheap, int) for rule in policy.rules):
        raise GhostifyError("a budget chooses how wide the ghosts see: use cheap 'auto', 'depthwise' or 'pointwise'")
    narrow = any(rule.narrow for rule in policy.rules)
    if narrow and calibration is None:
        raise GhostifyError("narrow looks at what maps predict of each other: pass calibration, unlabelled images")
    found = targets(program, policy)
    wished = [t for t in found if isinstance(t, Target)]
    totals = {key: _total(program, key, clock) for key in keys}
    seen = None if calibration is None else calibrate(program, calibration, seed)
    groups, unprunable = _thin(program, policy, wished) if narrow else ([], [])
    thinnings = [] if seen is None else thinnings_of(program, groups, seen, seed)
    numbers, ties, links = {t.conv.name: k for k, t in enumerate(wished)}, list[Tie](), list[list[Candidate]]()
    for link, thinning in enumerate(thinnings, len(wished)):
        own = [m for m in thinning.group.members if m.conv.name in numbers]
        others = [m for m in thinning.group.members if m not in own]
        links.append(thinned(program, thinning, others, keys, clock))
        ties += [Tie(numbers[m.conv.name], link, "makes") for m in own if m.prunes_outputs]
        ties += [Tie(numbers[m.conv.name], link, "reads") for m in own if m.prunes_inputs]
    options = []
    for k, (target, profile) in enumerate(zip(wished, profiles_of(program, wished, seen, seed), strict=True)):
        made, read = (
            [c.kept for t in ties if (t.conv, t.key) == (k, key) for c in links[t.link - len(wished)] if c.kept]
            for key in ("makes", "reads")
        )
        options.append(candidates_of(program, target, profile, keys, clock, made, [len(kept) for kept in read]))
    lines = tuple(thinning.group for thinning in thinnings)
    notes = (_why_unpruned(groups, unprunable),) if narrow and not thinnings else ()
    return Choices(program, tuple(found), (*options, *links), totals, clock, lines, tuple(ties), notes)


def _thin(program: Program, policy: Policy, wished: list[Target]) -> tuple[list[PruningGroup], list[Unprunable]]:
    """Channel groups whose convolutions may all lose channels, and the others with their reasons."""
    names, groups, unprunable = {target.conv.name for target in wished}, list[PruningGroup](), list[Unprunable]()
    for group in find_pruning_groups(program):
        if isinstance(group, Unprunable):
            unprunable.append(group)
            continue
        kept = [conv for conv in group.dense if conv.name not in names]
        kept += [member.conv for member in group.members if not may_narrow(program, policy, member.conv)]
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


def choose(choices: Choices, budget: Mapping[str, float]) -> Choice:
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
        if share <= goal * TOLERATED:
            return replace(made, shares={**made.shares, "latency": share})
        asked[k] *= goal / share
    raise OutOfReachError(
        f"budget latency={budget['latency']:g} is out of reach: its layers promise it, but the whole model takes "
        f"{share:.3f} of the original's time"
    )


def _within(choices: Choices, limits: list[float]) -> Choice | None:
    rest = choices.fixed
    picks = solve(choices.options, [limit - own for limit, own in zip(limits, rest, strict=True)], choices.ties)
    if picks is None:
        return None
    picked = [options[pick] for options, pick in zip(choices.options, picks, strict=True)]
    wished = [t for t in choices.found if isinstance(t, Target)]
    layouts = {t.conv.name: c.layout for t, c in zip(wished, picked[: len(wished)], strict=True)}
    thin = zip(choices.links, picked[len(wished) :], strict=True)
    kept = {link: c.kept for link, c in thin if c.kept is not None}
    spent = [own + sum(c.costs[k] for c in picked) for k, own in enumerate(rest)]
    decided = [_decided(t, layouts) for t in choices.found]
    return Choice(
        replace(plan_layouts(choices.program, decided, kept), notes=choices.notes),
        {key: own / total for (key, total), own in zip(choices.totals.items(), spent, strict=True)},
        sum(c.loss for c in picked),
    )


def _share_of_time(choices: Choices, plan: Plan) -> float:
    """How long the whole model takes under a plan, in parts of the original's time: layers may not add up."""
    program = choices.program
    made = rewrite(program, plan, unfitted(program, plan, shuffled=True))
    before, after = paired([program.module, made], program.example, choices.clock)
    return after / before


def _total(program: Program, key: str, clock: Stopwatch) -> float:
    """What the whole model costs."""
    if key == "latency":
        return model_milliseconds(program, clock)
    return float((program.macs or 0) if key == "macs" else cost.parameters(program.module))


def _out_of_reach(choices: Choices, budget: Mapping[str, float], limits: list[float]) -> NoReturn:
    for (key, least), limit in zip(choices.reach.items(), limits, strict=True):
        if least * choices.totals[key] > limit:
            share = math.ceil(1000 * least) / 1000
            raise OutOfReachError(
                f"budget {key}={budget[key]:g} is out of reach: these rules reach {share:g} at the least"
            )
    raise OutOfReachError("the budgets are out of reach together: relax one of them")


def _decided(target: Target | Skip, layouts: dict[str, GhostLayout | None]) -> tuple[Target, GhostLayout] | Skip:
    if isinstance(target, Skip):
        return target
    layout = layouts[target.conv.name]
    return Skip(target.conv, "the budget is kept without it") if layout is None else (target, layout)
