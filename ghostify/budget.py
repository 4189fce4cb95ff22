"""From a budget to per-layer layouts: candidates with their cost and the error they would cause, solved exactly."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, fx, nn

from ghostify import cost, sight
from ghostify.assign import choose_groups
from ghostify.calls import run
from ghostify.datafree import statistics_of
from ghostify.errors import GhostifyError
from ghostify.ghost import Layout, intrinsic_maps
from ghostify.measure import layer_milliseconds, model_milliseconds, paired
from ghostify.modes import evaluating
from ghostify.moments import MapMoments, Moments
from ghostify.pairs import MapStatistics, map_statistics
from ghostify.plan import Plan, Skip, Target, plan_layouts, targets
from ghostify.policy import Policy
from ghostify.program import Convolution, Program
from ghostify.propagate import input_channels
from ghostify.record import looking
from ghostify.rewrite import rewrite
from ghostify.sensitivity import Calibration, calibrate, metric_of
from ghostify.starts import unfitted
from ghostify.systems import root_of
from ghostify.wiring import Wiring, norm_after

RATIOS = (1.25, 1.5, 2, 2.5, 3, 4, 6, 8)
STEPS = 32
LANES = 16
FASTER = 0.97
REVISIONS = 4
TOLERATED = 1.01
POSITIONS = 20_000
MAP_POSITIONS = 8_000
IDENTITY = nn.Conv2d(1, 1, 1, device="meta")


@dataclass(frozen=True)
class Candidate:
    """One way to treat a convolution: its layout (None: as it is), its costs, and the output error it would add."""

    layout: Layout | None
    costs: tuple[float, ...]
    loss: float


@dataclass(frozen=True, eq=False)
class Profile:
    """A convolution's outputs in the original: their covariance (n x n), or those on either half of the images; pair
    statistics if wanted, and the metric by which errors count."""

    covariances: tuple[Tensor, ...]
    maps: MapStatistics | None
    metric: Tensor


def plan_within(
    program: Program,
    policy: Policy,
    budget: Mapping[str, float],
    calibration: Iterable[Any] | Calibration | None = None,
    seed: int = 0,
) -> Plan:
    """The plan under `policy` that keeps within `budget` with the least expected error of the model's outputs.

    `budget` limits "macs", "params" and "latency", alone or together: as a share of the original's if at most 1, else
    as a number, of milliseconds for one forward of the example inputs. It takes the place of the rules' ratios.
    Latencies are those of the inference form, layer by layer, measured on this machine (see `measure`); with one, no
    layer is rewritten that does not get faster. `program` needs shapes. Raises `GhostifyError` for a budget out of
    reach, saying what is within reach.
    """
    totals = _totals(program, budget)
    limits = _limits(totals, budget)
    if any(isinstance(rule.cheap, int) for rule in policy.rules):
        raise GhostifyError("a budget chooses how wide the ghosts see: use cheap 'auto', 'depthwise' or 'pointwise'")
    found = targets(program, policy)
    wished = [t for t in found if isinstance(t, Target)]
    if calibration is None:
        profiles = _data_free(program, wished)
    else:
        profiles = _profiled(program, wished, calibrate(program, calibration, seed), seed)
    choices = [_candidates(program, t, profiles[t.conv.name], tuple(budget)) for t in wished]
    fixed = [total - sum(options[0].costs[k] for options in choices) for k, total in enumerate(totals.values())]
    asked = list(limits)
    for _ in range(REVISIONS):
        chosen = solve(choices, [limit - own for limit, own in zip(asked, fixed, strict=True)])
        if chosen is None and asked != limits:
            break
        if chosen is None:
            reach = [sum(min(c.costs[k] for c in options) for options in choices) for k in range(len(limits))]
            _out_of_reach(totals, budget, limits, [r + f for r, f in zip(reach, fixed, strict=True)])
        assert chosen is not None
        layouts = {t.conv.name: options[pick].layout for t, options, pick in zip(wished, choices, chosen, strict=True)}
        made = plan_layouts(program, [_decided(t, layouts) for t in found])
        if "latency" not in budget:
            return made
        clock = tuple(budget).index("latency")
        share, goal = _share_of_time(program, made), limits[clock] / totals["latency"]
        if share <= goal * TOLERATED:
            return made
        asked[clock] *= goal / share
    raise GhostifyError(
        f"budget latency={budget['latency']:g} is out of reach: its layers promise it, but the whole model takes "
        f"{share:.3f} of the original's time"
    )


def solve(choices: list[list[Candidate]], limits: list[float]) -> list[int] | None:
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


def _share_of_time(program: Program, plan: Plan) -> float:
    """How long the whole model takes under a plan, in parts of the original's time: layers may not add up."""
    made = rewrite(program, plan, unfitted(program, plan, shuffled=True))
    before, after = paired([program.module, made], program.example)
    return after / before


def _limits(totals: Mapping[str, float], budget: Mapping[str, float]) -> list[float]:
    limits = []
    for key, value in budget.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise GhostifyError(f"budget {key}={value!r} is not a positive number")
        limits.append(value * totals[key] if value <= 1 else float(value))
    return limits


def _totals(program: Program, budget: Mapping[str, float]) -> dict[str, float]:
    """What the whole model costs, by the budget's names."""
    if not budget:
        raise GhostifyError("the budget is empty: use {'macs': 0.5} to halve the multiply-accumulates")
    if program.macs is None:
        raise GhostifyError("a budget needs to know the model's shapes: pass example_inputs")
    known: dict[str, Callable[[], float]] = {
        "macs": lambda: float(program.macs or 0),
        "params": lambda: float(cost.parameters(program.module)),
        "latency": lambda: model_milliseconds(program),
    }
    for key in budget:
        if key not in known:
            raise GhostifyError(f"budget {key!r} is unknown: known are {', '.join(known)}")
    return {key: known[key]() for key in budget}


def _spent(program: Program, conv: Convolution, layouts: list[Layout | None], key: str) -> list[float]:
    """What each layout of a layer costs; each weight is used once a position."""
    if key == "latency":
        return layer_milliseconds(program.conv(conv.name), conv, layouts)
    weights = [cost.dense_macs(conv) if own is None else cost.ghost_macs(conv, own) for own in layouts]
    if key == "macs":
        return [float(w * (cost.positions(conv.calls) or 0)) for w in weights]
    return [float(w + conv.outputs * conv.bias) for w in weights]


def _out_of_reach(
    totals: Mapping[str, float], budget: Mapping[str, float], limits: list[float], reach: list[float]
) -> None:
    for (key, value), limit, least in zip(budget.items(), limits, reach, strict=True):
        if least > limit:
            share = math.ceil(1000 * least / totals[key]) / 1000
            raise GhostifyError(f"budget {key}={value:g} is out of reach: these rules reach {share:g} at the least")
    raise GhostifyError("the budgets are out of reach together: relax one of them")


def _decided(target: Target | Skip, layouts: dict[str, Layout | None]) -> tuple[Target, Layout] | Skip:
    if isinstance(target, Skip):
        return target
    layout = layouts[target.conv.name]
    return Skip(target.conv, "the budget is kept without it") if layout is None else (target, layout)


def _candidates(program: Program, target: Target, profile: Profile, keys: tuple[str, ...]) -> list[Candidate]:
    """As it is, first, and every layout of the rule's form that saves multiply-accumulates and is worth its cost."""
    conv, dense = target.conv, cost.dense_macs(target.conv)
    timed = "latency" in keys
    found = [(own, loss) for own, loss in _losses(target, profile, timed) if cost.ghost_macs(conv, own) < dense]
    layouts = [None, *(own for own, _ in found)]
    costs = zip(*(_spent(program, conv, layouts, key) for key in keys), strict=True)
    losses = [0.0, *(loss for _, loss in found)]
    options = [Candidate(*each) for each in zip(layouts, costs, losses, strict=True)]
    if timed:
        clock = keys.index("latency")
        options = [o for o in options if o.layout is None or o.costs[clock] < FASTER * options[0].costs[clock]]
    return [c for c in options if c.layout is None or not any(_dominates(o, c) for o in options)]


def _dominates(a: Candidate, b: Candidate) -> bool:
    better = a.loss <= b.loss and all(x <= y for x, y in zip(a.costs, b.costs, strict=True))
    return better and (a.loss, a.costs) != (b.loss, b.costs)


def _losses(target: Target, profile: Profile, timed: bool = False) -> Iterator[tuple[Layout, float]]:
    """Layouts and the loss of each; where they are to be timed, fewer ones, that fill vector registers."""
    n, cheap = target.conv.outputs, target.rule.cheap
    if cheap in ("auto", "pointwise"):
        tails = _tails(profile)
        sizes = {max(1, round(n * k / STEPS)) for k in range(1, STEPS)}
        if timed:
            sizes = {max(LANES, LANES * round(m / LANES)) for m in sizes}
        for m in sorted(m for m in sizes if m < n):
            yield Layout(n, m, m, 1), float(tails[n - m])
    if profile.maps is not None:
        costs = profile.maps.costs(profile.metric.diagonal())
        for m in sorted({intrinsic_maps(n, ratio) for ratio in RATIOS} - {n}):
            layout = Layout(n, m, 1, target.rule.dw_size)
            yield layout, choose_groups(costs, layout).total(costs)


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


def _wants_maps(target: Target) -> bool:
    return target.rule.cheap != "pointwise"


def _data_free(program: Program, wished: list[Target]) -> dict[str, Profile]:
    """Profiles under white inputs; every layer's whole output counts alike."""
    profiles, wiring = {}, {path: Wiring(part) for path, part in program.parts.items()}
    known = {path: input_channels(part) for path, part in program.parts.items()}
    for target in wished:
        conv, part = program.conv(target.conv.name), program.parts[target.conv.part]
        behind = norm_after(wiring[target.conv.part], [call.node for call in target.conv.calls])
        norm: Any = None if behind is None else part.get_submodule(behind)
        inputs = known[target.conv.part].get(target.conv.calls[0].node)
        one = statistics_of(conv, norm, 1, inputs=inputs)
        assert not isinstance(one, MapStatistics)
        maps: Any = (
            statistics_of(conv, norm, target.rule.dw_size, inputs=inputs, map_by_map=True)
            if _wants_maps(target)
            else None
        )
        weights = 1 / one.var.clamp_min(1e-12 * one.var.max() + 1e-30) / len(one.var)
        profiles[target.conv.name] = Profile((one.gram[0, :, 0],), maps, torch.diag(weights))
    return profiles


def _profiled(program: Program, wished: list[Target], calibration: Calibration, seed: int) -> dict[str, Profile]:
    """Profiles from one forward of the original over the calibration images, and what its outputs feel."""
    felt, images = calibration.felt, calibration.batches.images
    by_node = {(t.conv.part, call.node): t for t in wished for call in t.conv.calls}
    halves = {t.conv.name: [Moments.zero(t.conv.outputs, 0) for _ in range(2)] for t in wished}
    maps = {t.conv.name: MapMoments.zero(t.conv.outputs, t.rule.dw_size**2) for t in wished if _wants_maps(t)}

    def look(first: int, part: str, node: fx.Node, _: Any, output: Tensor) -> Tensor:
        target = by_node.get((part, node.name))
        if target is None:
            return output
        name, seen = target.conv.name, output.float().cpu()
        places = sight.choose_places(seen.shape, sight.share_of(POSITIONS, images), seed + first)
        rows, odd = sight.values(seen, places), (places[0] + first) % 2
        for half, moments in enumerate(halves[name]):
            mine = rows[odd == half]
            moments.add(mine, mine[:, :0])
        if name in maps:
            d, side = target.rule.dw_size, math.ceil(sight.share_of(MAP_POSITIONS, images) ** 0.5)
            view = sight.view(IDENTITY, seen, seen, side, d, seed + first)
            maps[name].add(sight.neighbourhoods(view.seen, d), sight.rows(view.target))
        return output

    with evaluating(program.module):
        for batch in calibration.batches.own:
            with looking(program.module, program.parts, partial(look, batch.first)):
                run(program.module, batch.inputs)
    found = {name: [moments.of_all_processes() for moments in both] for name, both in halves.items()}
    profiles = _data_free(program, [t for t in wished if not any(m.count for m in found[t.conv.name])])
    for name, parts in found.items():
        if name in profiles:
            continue
        whole = (parts[0] + parts[1]).centred()[0]
        covariances = tuple(p.centred()[0] for p in parts) if all(p.count for p in parts) else (whole,)
        alike = 1 / whole.diagonal().clamp_min(1e-30).sum()
        metric = metric_of(felt[name]) if name in felt else alike * torch.eye(len(whole), dtype=torch.float64)
        pairs = map_statistics(maps[name].of_all_processes()) if name in maps else None
        profiles[name] = Profile(covariances, pairs, metric)
    return profiles
