"""What planning knows of each convolution: covariances of its outputs, pairs of its maps, and the metric for errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.fitting import patches
from ghostify.fitting.bn_statistics import input_channel_stats
from ghostify.fitting.data_free import data_free_statistics
from ghostify.fitting.depthwise_statistics import PerMapStatistics, map_statistics
from ghostify.fitting.linear_solvers import damping_for, solve_damped
from ghostify.fitting.lstsq import JointStatistics
from ghostify.fitting.moments import Moments, PerMapMoments
from ghostify.fitting.sensitivity import Calibration, prepare_calibration
from ghostify.graph.batchnorm import batchnorm_at
from ghostify.graph.neighbours import GraphIndex, following_norm
from ghostify.graph.program import Program
from ghostify.modules.layout import Depthwise, Grouped
from ghostify.planning.planner import PlanTarget
from ghostify.search.halves import POSITIONS, add_by_halves, conv_error_metric, covariances_of, visit_convs

MAP_POSITIONS = 8_000
MAX_BYTES = 3 * 2**30
IDENTITY = nn.Conv2d(1, 1, 1, device="meta")


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """A convolution's outputs in the original: their covariance (n x n), or those on either half of the images; pair
    statistics if wanted, and the metric by which errors count."""

    covariances: tuple[Tensor, ...]
    maps: PerMapStatistics | None
    metric: Tensor

    def restrict_to(self, kept: Sequence[int]) -> LayerStatistics:
        """That of some maps which stand for all, without pairs: their errors are those of what they predict as well."""
        index, whole = torch.tensor(kept), sum(self.covariances[1:], self.covariances[0]) / len(self.covariances)
        own = whole[index][:, index]
        predicted = solve_damped(own, whole[index], damping_for(own, POSITIONS))
        covariances = tuple(c[index][:, index] for c in self.covariances)
        return LayerStatistics(covariances, None, predicted @ self.metric @ predicted.T)

    def among(self, maps: Tensor) -> LayerStatistics:
        """That of some maps by themselves, without pairs."""
        covariances = tuple(c[maps][:, maps] for c in self.covariances)
        return LayerStatistics(covariances, None, self.metric[maps][:, maps])


def compute_layer_statistics(
    program: Program, wished: list[PlanTarget], calibration: Iterable[Any] | Calibration | None, seed: int
) -> Iterator[LayerStatistics]:
    """The profile of each target in turn, from calibration images where there are any.

    Those of all layers of a large network do not fit into memory at once: without images each is made when it is asked
    for, with images those of as many layers as AT_ONCE bytes hold, in one forward of the images.
    """
    if calibration is None:
        yield from _data_free(program, wished)
        return
    seen = prepare_calibration(program, calibration, seed)
    for group in _groups(wished):
        found = _profiled(program, group, seen, seed)
        for target in group:
            yield found.pop(target.conv.name)


def _groups(wished: list[PlanTarget]) -> Iterator[list[PlanTarget]]:
    """Neighbours whose moments together take AT_ONCE bytes at most, or one alone."""
    group: list[PlanTarget] = []
    size = 0
    for target in wished:
        own = 8 * target.conv.outputs**2 * (2 + _wants_maps(target) * target.rule.dw_size**2)
        if group and size + own > MAX_BYTES:
            yield group
            group, size = [], 0
        group.append(target)
        size += own
    if group:
        yield group


def _wants_maps(target: PlanTarget) -> bool:
    """Whether the losses of its forms follow from pairs of maps."""
    return Depthwise in target.rule.forms or Grouped in target.rule.forms


def _data_free(program: Program, wished: list[PlanTarget]) -> Iterator[LayerStatistics]:
    """Profiles under white inputs; every layer's whole output counts alike."""
    wiring = {path: GraphIndex(part) for path, part in program.subgraphs.items()}
    known = {path: input_channel_stats(part) for path, part in program.subgraphs.items()}
    for target in wished:
        conv, part = program.conv(target.conv.name), program.subgraphs[target.conv.subgraph_path]
        norm = batchnorm_at(
            part, following_norm(wiring[target.conv.subgraph_path], [call.node for call in target.conv.calls])
        )
        inputs = known[target.conv.subgraph_path].get(target.conv.calls[0].node)
        one = data_free_statistics(conv, norm, 1, inputs=inputs)
        assert isinstance(one, JointStatistics)
        maps = None
        if _wants_maps(target):
            maps = data_free_statistics(conv, norm, target.rule.dw_size, inputs=inputs, map_by_map=True)
        assert not isinstance(maps, JointStatistics)
        weights = 1 / one.var.clamp_min(1e-12 * one.var.max() + 1e-30) / len(one.var)
        yield LayerStatistics((one.gram[0, :, 0],), maps, torch.diag(weights))


def _profiled(
    program: Program, wished: list[PlanTarget], calibration: Calibration, seed: int
) -> dict[str, LayerStatistics]:
    """Profiles from one forward of the original over the calibration images, and what its outputs feel."""
    images = calibration.batches.images
    by_node = {(t.conv.subgraph_path, call.node): t for t in wished for call in t.conv.calls}
    halves = {t.conv.name: [Moments.zero(t.conv.outputs, 0) for _ in range(2)] for t in wished}
    maps = {t.conv.name: PerMapMoments.zero(t.conv.outputs, t.rule.dw_size**2) for t in wished if _wants_maps(t)}

    def on_call(first: int, part: str, node: fx.Node, _: Tensor, output: Tensor) -> None:
        target = by_node.get((part, node.name))
        if target is None:
            return
        name, size = target.conv.name, target.rule.dw_size
        add_by_halves(halves[name], output, first, images, seed)
        if name in maps:
            outputs, side = output.float().cpu(), math.ceil(patches.positions_per_map(MAP_POSITIONS, images) ** 0.5)
            view = patches.random_crop(IDENTITY, outputs, outputs, side, size, seed + first)
            maps[name].add(patches.unfold_neighbours(view.padded_input, size), patches.flatten_positions(view.target))

    visit_convs(program, calibration, on_call)
    found = {name: [moments.all_reduced() for moments in both] for name, both in halves.items()}
    unseen = [t for t in wished if not any(m.count for m in found[t.conv.name])]
    profiles = {t.conv.name: made for t, made in zip(unseen, _data_free(program, unseen), strict=True)}
    for name, parts in found.items():
        if name in profiles:
            continue
        whole, covariances = covariances_of(parts)
        pairs = map_statistics(maps[name].all_reduced()) if name in maps else None
        profiles[name] = LayerStatistics(covariances, pairs, conv_error_metric(calibration, name, whole))
    return profiles
