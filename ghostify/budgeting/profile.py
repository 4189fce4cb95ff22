"""What planning knows of each convolution: covariances of its outputs, pairs of its maps, and the metric for errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.fitting import sight
from ghostify.fitting.datafree import statistics_of
from ghostify.fitting.moments import MapMoments, Moments
from ghostify.fitting.pairs import MapStatistics, map_statistics
from ghostify.fitting.sensitivity import Calibration, calibrate, metric_of
from ghostify.fitting.systems import damping_for, solve_damped
from ghostify.graph.batchnorm import batchnorm_at
from ghostify.planning.plan import Target
from ghostify.tracing.calls import run
from ghostify.tracing.modes import evaluating
from ghostify.tracing.program import Program
from ghostify.tracing.propagate import input_channels
from ghostify.tracing.record import looking
from ghostify.tracing.wiring import Wiring, norm_after

POSITIONS = 20_000
MAP_POSITIONS = 8_000
AT_ONCE = 3 * 2**30
IDENTITY = nn.Conv2d(1, 1, 1, device="meta")


@dataclass(frozen=True, eq=False)
class Profile:
    """A convolution's outputs in the original: their covariance (n x n), or those on either half of the images; pair
    statistics if wanted, and the metric by which errors count."""

    covariances: tuple[Tensor, ...]
    maps: MapStatistics | None
    metric: Tensor

    def of(self, kept: Sequence[int]) -> Profile:
        """That of some maps which stand for all, without pairs: their errors are those of what they predict as well."""
        index, whole = torch.tensor(kept), sum(self.covariances[1:], self.covariances[0]) / len(self.covariances)
        own = whole[index][:, index]
        predicted = solve_damped(own, whole[index], damping_for(own, POSITIONS))
        covariances = tuple(c[index][:, index] for c in self.covariances)
        return Profile(covariances, None, predicted @ self.metric @ predicted.T)


def profiles_of(
    program: Program, wished: list[Target], calibration: Iterable[Any] | Calibration | None, seed: int
) -> Iterator[Profile]:
    """The profile of each target in turn, from calibration images where there are any.

    Those of all layers of a large network do not fit into memory at once: without images each is made when it is asked
    for, with images those of as many layers as AT_ONCE bytes hold, in one forward of the images.
    """
    if calibration is None:
        yield from _data_free(program, wished)
        return
    seen = calibrate(program, calibration, seed)
    for group in _groups(wished):
        found = _profiled(program, group, seen, seed)
        for target in group:
            yield found.pop(target.conv.name)


def _groups(wished: list[Target]) -> Iterator[list[Target]]:
    """Neighbours whose moments together take AT_ONCE bytes at most, or one alone."""
    group: list[Target] = []
    size = 0
    for target in wished:
        own = 8 * target.conv.outputs**2 * (2 + _wants_maps(target) * target.rule.dw_size**2)
        if group and size + own > AT_ONCE:
            yield group
            group, size = [], 0
        group.append(target)
        size += own
    if group:
        yield group


def _wants_maps(target: Target) -> bool:
    return target.rule.cheap != "pointwise"


def _data_free(program: Program, wished: list[Target]) -> Iterator[Profile]:
    """Profiles under white inputs; every layer's whole output counts alike."""
    wiring = {path: Wiring(part) for path, part in program.parts.items()}
    known = {path: input_channels(part) for path, part in program.parts.items()}
    for target in wished:
        conv, part = program.conv(target.conv.name), program.parts[target.conv.part]
        norm = batchnorm_at(part, norm_after(wiring[target.conv.part], [call.node for call in target.conv.calls]))
        inputs = known[target.conv.part].get(target.conv.calls[0].node)
        one = statistics_of(conv, norm, 1, inputs=inputs)
        assert not isinstance(one, MapStatistics)
        maps: Any = (
            statistics_of(conv, norm, target.rule.dw_size, inputs=inputs, map_by_map=True)
            if _wants_maps(target)
            else None
        )
        weights = 1 / one.var.clamp_min(1e-12 * one.var.max() + 1e-30) / len(one.var)
        yield Profile((one.gram[0, :, 0],), maps, torch.diag(weights))


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
    unseen = [t for t in wished if not any(m.count for m in found[t.conv.name])]
    profiles = {t.conv.name: made for t, made in zip(unseen, _data_free(program, unseen), strict=True)}
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
