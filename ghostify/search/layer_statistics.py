"""What planning knows of each convolution: covariances of its outputs, pairs of its maps, and the metric for errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.fitting import patches
from ghostify.fitting.bn_statistics import input_channels
from ghostify.fitting.data_free import statistics_of
from ghostify.fitting.depthwise_statistics import MapStatistics, map_statistics
from ghostify.fitting.linear_solvers import damping_for, solve_damped
from ghostify.fitting.lstsq import Statistics
from ghostify.fitting.moments import MapMoments, Moments
from ghostify.fitting.sensitivity import Calibration, calibrate
from ghostify.graph.batchnorm import batchnorm_at
from ghostify.graph.neighbours import Wiring, norm_after
from ghostify.graph.program import Program
from ghostify.modules.layout import Depthwise, Grouped
from ghostify.planning.planner import Target
from ghostify.search.halves import POSITIONS, add_by_halves, covariances_of, error_metric, visit_convolutions

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

    def among(self, maps: Tensor) -> Profile:
        """That of some maps by themselves, without pairs."""
        covariances = tuple(c[maps][:, maps] for c in self.covariances)
        return Profile(covariances, None, self.metric[maps][:, maps])


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
    """Whether the losses of its forms follow from pairs of maps."""
    return Depthwise in target.rule.forms or Grouped in target.rule.forms


def _data_free(program: Program, wished: list[Target]) -> Iterator[Profile]:
    """Profiles under white inputs; every layer's whole output counts alike."""
    wiring = {path: Wiring(part) for path, part in program.parts.items()}
    known = {path: input_channels(part) for path, part in program.parts.items()}
    for target in wished:
        conv, part = program.conv(target.conv.name), program.parts[target.conv.part]
        norm = batchnorm_at(part, norm_after(wiring[target.conv.part], [call.node for call in target.conv.calls]))
        inputs = known[target.conv.part].get(target.conv.calls[0].node)
        one = statistics_of(conv, norm, 1, inputs=inputs)
        assert isinstance(one, Statistics)
        maps = None
        if _wants_maps(target):
            maps = statistics_of(conv, norm, target.rule.dw_size, inputs=inputs, map_by_map=True)
        assert not isinstance(maps, Statistics)
        weights = 1 / one.var.clamp_min(1e-12 * one.var.max() + 1e-30) / len(one.var)
        yield Profile((one.gram[0, :, 0],), maps, torch.diag(weights))


def _profiled(program: Program, wished: list[Target], calibration: Calibration, seed: int) -> dict[str, Profile]:
    """Profiles from one forward of the original over the calibration images, and what its outputs feel."""
    images = calibration.batches.images
    by_node = {(t.conv.part, call.node): t for t in wished for call in t.conv.calls}
    halves = {t.conv.name: [Moments.zero(t.conv.outputs, 0) for _ in range(2)] for t in wished}
    maps = {t.conv.name: MapMoments.zero(t.conv.outputs, t.rule.dw_size**2) for t in wished if _wants_maps(t)}

    def on_call(first: int, part: str, node: fx.Node, _: Tensor, output: Tensor) -> None:
        target = by_node.get((part, node.name))
        if target is None:
            return
        name, size = target.conv.name, target.rule.dw_size
        add_by_halves(halves[name], output, first, images, seed)
        if name in maps:
            outputs, side = output.float().cpu(), math.ceil(patches.share_of(MAP_POSITIONS, images) ** 0.5)
            view = patches.view(IDENTITY, outputs, outputs, side, size, seed + first)
            maps[name].add(patches.neighbourhoods(view.seen, size), patches.rows(view.target))

    visit_convolutions(program, calibration, on_call)
    found = {name: [moments.of_all_processes() for moments in both] for name, both in halves.items()}
    unseen = [t for t in wished if not any(m.count for m in found[t.conv.name])]
    profiles = {t.conv.name: made for t, made in zip(unseen, _data_free(program, unseen), strict=True)}
    for name, parts in found.items():
        if name in profiles:
            continue
        whole, covariances = covariances_of(parts)
        pairs = map_statistics(maps[name].of_all_processes()) if name in maps else None
        profiles[name] = Profile(covariances, pairs, error_metric(calibration, name, whole))
    return profiles
