"""From a budget to per-layer layouts: candidates with their cost and the error they would cause, solved exactly."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from ghostify.budgeting.measure import layer_milliseconds, model_milliseconds, paired
from ghostify.budgeting.profile import Profile, profiles_of
from ghostify.budgeting.stopwatch import Stopwatch
from ghostify.errors import GhostifyError
from ghostify.fitting.assign import choose_groups
from ghostify.fitting.sensitivity import Calibration
from ghostify.fitting.starts import unfitted
from ghostify.fitting.systems import root_of
from ghostify.ghost import Layout, intrinsic_maps
from ghostify.planning import cost
from ghostify.planning.plan import Plan, Skip, Target, plan_layouts, targets
from ghostify.planning.policy import Policy
from ghostify.rewrite import rewrite
from ghostify.tracing.program import Convolution, Program

RATIOS = (1.25, 1.5, 2, 2.5, 3, 4, 6, 8)
STEPS = 32
LANES = 16
FASTER = 0.97
REVISIONS = 6
TOLERATED = 1.01
COSTS = ("macs", "params", "latency")


@dataclass(frozen=True)
class Candidate:
    """One way to treat a convolution: its layout (None: as it is), its costs, and the output error it would add."""

    layout: Layout | None
    costs: tuple[float, ...]
    loss: float


@dataclass(frozen=True, eq=False)
class Choices:
    """What may become of each convolution that a rule targets, and what the whole model costs, by the budget's names.

    `fixed` is what costs that no choice is about; `found` every convolution's target, or why it stays.
    """

    program: Program
    found: tuple[Target | Skip, ...]
    options: tuple[tuple[Candidate, ...], ...]
    totals: Mapping[str, float]
    clock: Stopwatch

    @property
    def fixed(self) -> list[float]:
        own = [sum(options[0].costs[k] for options in self.options) for k in range(len(self.totals))]
        return [total - spent for total, spent in zip(self.totals.values(), own, strict=True)]

    @property
    def reach(self) -> dict[str, float]:
        """The least share of each cost that the layers reach, each on its own."""
        least = [sum(min(c.costs[k] for c in options) for options in self.options) for k in range(len(self.totals))]
        both = zip(self.totals.items(), least, self.fixed, strict=True)
        return {key: (spent + rest) / total for (key, total), spent, rest in both}


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
    Latencies are those of the inference form in `runtime` ("eager", "compile", "onnx" or "openvino"), layer by layer,
    measured on this machine (see `measure`); with one, no layer is rewritten that does not get faster. `program` needs
    shapes. Raises `GhostifyError` for a budget out of reach, saying what is within reach.
    """
    check(budget)
    with Stopwatch(runtime) as clock:
        return choose(choices_of(program, policy, tuple(budget), calibration, seed, clock), budget).plan


def check(budget: Mapping[str, float]) -> None:
    """Raises `GhostifyError` for limits that mean nothing."""
    if not budget:
        raise GhostifyError("the budget is empty: use {'macs': 0.5} to halve the multiply-accumulates")
    for key, value in budget.items():
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
    found = targets(program, policy)
    wished = [t for t in found if isinstance(t, Target)]
    totals = {key: _total(program, key, clock) for key in keys}
    profiles = profiles_of(program, wished, calibration, seed)
    each = zip(wished, profiles, strict=True)
    options = tuple(tuple(_candidates(program, target, profile, keys, clock)) for target, profile in each)
    return Choices(program, tuple(found), options, totals, clock)


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
    raise GhostifyError(
        f"budget latency={budget['latency']:g} is out of reach: its layers promise it, but the whole model takes "
        f"{share:.3f} of the original's time"
    )


def _within(choices: Choices, limits: list[float]) -> Choice | None:
    rest = choices.fixed
    picks = solve(choices.options, [limit - own for limit, own in zip(limits, rest, strict=True)])
    if picks is None:
        return None
    picked = [options[pick] for options, pick in zip(choices.options, picks, strict=True)]
    wished = [t for t in choices.found if isinstance(t, Target)]
    layouts = {t.conv.name: c.layout for t, c in zip(wished, picked, strict=True)}
    spent = [own + sum(c.costs[k] for c in picked) for k, own in enumerate(rest)]
    return Choice(
        plan_layouts(choices.program, [_decided(t, layouts) for t in choices.found]),
        {key: own / total for (key, total), own in zip(choices.totals.items(), spent, strict=True)},
        sum(c.loss for c in picked),
    )


def solve(choices: Sequence[Sequence[Candidate]], limits: list[float]) -> list[int] | None:
    """One candidate of each list, with the least sum of losses among those whose costs keep within `limits`, or None.

    A mixed-integer program, to a relative gap of 1e-4.
    """
    if not choices:
        return [] if all(limit >= 0 for limit in limits) else None
    flat = [c for options in choices for c in options]
    owner = np.repeat(np.arange(len(choices)), [len(options) for options in choices])
    one_each = LinearConstraint((owner == np.arange(len(choices))[:, None]).astype(float), 1, 1)
    spent = np.array([c.costs for c in flat], dtype=float).T
    scale = spent.max(axis=1, initial=1)
    within = LinearConstraint(spent / scale[:, None], -np.inf, np.array(limits) / scale)
    losses = np.array([c.loss for c in flat])
    with _mute():
        result = milp(
            losses / max(losses.max(), 1e-300),
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[one_each, within],
            options={"mip_rel_gap": 1e-4, "time_limit": 60},
        )
    if result.x is None:
        return None
    starts = np.cumsum([0, *(len(options) for options in choices)])
    return [int(result.x[a:b].argmax()) for a, b in pairwise(starts)]


@contextmanager
def _mute() -> Iterator[None]:
    """Keep standard output clean of what the solver's library writes there past Python, whatever its options say."""
    sys.stdout.flush()
    standing, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(standing, 1)
        os.close(standing)
        os.close(nowhere)


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


def _spent(
    program: Program, conv: Convolution, layouts: list[Layout | None], key: str, clock: Stopwatch
) -> list[float]:
    """What each layout of a layer costs; each weight is used once a position."""
    if key == "latency":
        return layer_milliseconds(program.conv(conv.name), conv, layouts, clock)
    weights = [cost.dense_macs(conv) if own is None else cost.ghost_macs(conv, own) for own in layouts]
    if key == "macs":
        return [float(w * (cost.positions(conv.calls) or 0)) for w in weights]
    return [float(w + conv.outputs * conv.bias) for w in weights]


def _out_of_reach(choices: Choices, budget: Mapping[str, float], limits: list[float]) -> NoReturn:
    for (key, least), limit in zip(choices.reach.items(), limits, strict=True):
        if least * choices.totals[key] > limit:
            share = math.ceil(1000 * least) / 1000
            raise GhostifyError(
                f"budget {key}={budget[key]:g} is out of reach: these rules reach {share:g} at the least"
            )
    raise GhostifyError("the budgets are out of reach together: relax one of them")


def _decided(target: Target | Skip, layouts: dict[str, Layout | None]) -> tuple[Target, Layout] | Skip:
    if isinstance(target, Skip):
        return target
    layout = layouts[target.conv.name]
    return Skip(target.conv, "the budget is kept without it") if layout is None else (target, layout)


def _candidates(
    program: Program, target: Target, profile: Profile, keys: tuple[str, ...], clock: Stopwatch
) -> list[Candidate]:
    """As it is, first, and every layout of the rule's form that saves multiply-accumulates and is worth its cost.

    What a layout costs is known before the error that it would add, which takes long to find for many maps: whatever
    is beaten at the least error that it could have is not looked at.
    """
    conv, timed, losses = target.conv, "latency" in keys, _Losses(profile, target.rule.dw_size)
    layouts = [own for own in _layouts(target, profile, timed) if cost.ghost_macs(conv, own) < cost.dense_macs(conv)]
    whole, *costs = zip(*(_spent(program, conv, [None, *layouts], key, clock) for key in keys), strict=True)
    found = [Candidate(None, whole, 0.0)]
    for layout, spent in zip(layouts, costs, strict=True):
        if timed and spent[keys.index("latency")] >= FASTER * whole[keys.index("latency")]:
            continue
        hoped = Candidate(layout, spent, losses.least(layout))
        if not any(_dominates(other, hoped) for other in found):
            found.append(Candidate(layout, spent, losses.of(layout)))
    return [found[0], *(c for c in found[1:] if not any(_dominates(other, c) for other in found))]


def _dominates(a: Candidate, b: Candidate) -> bool:
    better = a.loss <= b.loss and all(x <= y for x, y in zip(a.costs, b.costs, strict=True))
    return better and (a.loss, a.costs) != (b.loss, b.costs)


def _layouts(target: Target, profile: Profile, timed: bool) -> Iterator[Layout]:
    """Pointwise ones, then depthwise ones; where they are to be timed, fewer, that fill vector registers."""
    n, cheap = target.conv.outputs, target.rule.cheap
    if cheap in ("auto", "pointwise"):
        sizes = {max(1, round(n * k / STEPS)) for k in range(1, STEPS)}
        if timed:
            sizes = {max(LANES, LANES * round(m / LANES)) for m in sizes}
        yield from (Layout(n, m, m, 1) for m in sorted(sizes) if m < n)
    if profile.maps is not None:
        for m in sorted({intrinsic_maps(n, ratio) for ratio in RATIOS} - {n}):
            yield Layout(n, m, 1, target.rule.dw_size)


class _Losses:
    """The error of the model's outputs that layouts of one convolution would add."""

    def __init__(self, profile: Profile, dw_size: int) -> None:
        self.profile, self.dw_size = profile, dw_size

    def of(self, layout: Layout) -> float:
        """That of the best directions for a pointwise layout, of the chosen pairs for a depthwise one."""
        if self._is_depthwise(layout):
            return choose_groups(self._pairs, layout).total(self._pairs)
        return float(self._tails[layout.ghosts])

    def least(self, layout: Layout) -> float:
        """No more than that: as if every ghost could choose its map, and the ghosts were those who lose least so."""
        if not self._is_depthwise(layout):
            return self.of(layout)
        return float(self._cheapest[: layout.ghosts].sum())

    def _is_depthwise(self, layout: Layout) -> bool:
        return layout.width == 1 and layout.dw_size == self.dw_size and self.profile.maps is not None

    @cached_property
    def _tails(self) -> Tensor:
        return _tails(self.profile)

    @cached_property
    def _pairs(self) -> Tensor:
        assert self.profile.maps is not None
        return self.profile.maps.costs(self.profile.metric.diagonal())

    @cached_property
    def _cheapest(self) -> Tensor:
        others = self._pairs.clone().fill_diagonal_(float("inf"))
        return others.amin(0).sort().values


def _tails(profile: Profile) -> Tensor:
    """Weighted error of the best n - k directions for the outputs, for k = 0 ... n left out: the sum of the k smallest
    eigenvalues. Directions of one half of the images are judged on the other: few images look simpler than they are."""
    root = root_of(profile.metric)
    halves = [root.T @ c @ root for c in profile.covariances]
    lost = torch.zeros(len(root), dtype=root.dtype)
    for own, other in zip(halves, reversed(halves), strict=True):
        vectors = torch.linalg.eigh(own).eigenvectors
        lost += ((vectors.T @ other) * vectors.T).sum(1).clamp_min(0) / len(halves)
    return torch.cat((torch.zeros(1, dtype=lost.dtype), lost.cumsum(0)))
