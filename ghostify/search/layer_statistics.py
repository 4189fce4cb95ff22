"""Statistics of each convolution for the search: output covariances, pair statistics, and the error metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from typing_extensions import assert_never

from ghostify.fitting import patches
from ghostify.fitting.bn_statistics import input_channel_stats
from ghostify.fitting.data_free import data_free_statistics
from ghostify.fitting.depthwise_statistics import PerMapStatistics, map_statistics
from ghostify.fitting.linear_solvers import damping_for, solve_damped
from ghostify.fitting.lstsq import JointStatistics
from ghostify.fitting.moments import Moments, PerMapMoments
from ghostify.fitting.sensitivity import PreparedCalibration, prepare_calibration
from ghostify.graph.batchnorm import batchnorm_at
from ghostify.graph.neighbours import GraphIndex, following_norm
from ghostify.graph.program import Program
from ghostify.modules.layout import Depthwise, GhostForm, Grouped, Pointwise
from ghostify.planning.planner import PlanTarget
from ghostify.search.halves import POSITIONS, add_by_halves, check_range, conv_error_metric, covariances_of, visit_convs

MAP_POSITIONS = 8_000
MAX_BYTES = 3 * 2**30
IDENTITY = nn.Conv2d(1, 1, 1, device="meta")


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Statistics of a convolution's n outputs in the original.

    `covariances` (n x n) are those on each half of the images, or a single one; `maps` are statistics of pairs of maps
    where a form of ghost needs them; `metric` (n x n) weighs errors.
    """

    covariances: tuple[Tensor, ...]
    maps: PerMapStatistics | None
    metric: Tensor

    def restrict_to(self, kept: Sequence[int]) -> LayerStatistics:
        """The statistics of the `kept` maps, without pairs; the metric includes the maps predicted from them."""
        index, whole = torch.tensor(kept), sum(self.covariances[1:], self.covariances[0]) / len(self.covariances)
        of_kept = whole[index][:, index]
        predicted = solve_damped(of_kept, whole[index], damping_for(of_kept, POSITIONS))
        covariances = tuple(c[index][:, index] for c in self.covariances)
        return LayerStatistics(covariances, None, predicted @ self.metric @ predicted.T)

    def among(self, maps: Tensor) -> LayerStatistics:
        """The statistics of some maps on their own, without pairs."""
        covariances = tuple(c[maps][:, maps] for c in self.covariances)
        return LayerStatistics(covariances, None, self.metric[maps][:, maps])


def compute_layer_statistics(
    program: Program, targets: list[PlanTarget], calibration: Iterable[Any] | PreparedCalibration | None, seed: int
) -> Iterator[LayerStatistics]:
    """The statistics of each target in turn, from calibration images or, without them, from the filters.

    Those of all layers of a large network exceed the memory. Without images, each is computed when it is requested;
    with images, as many as fit into `MAX_BYTES` are computed in one forward.
    """
    if calibration is None:
        yield from _data_free(program, targets)
        return
    prepared = prepare_calibration(program, calibration, seed)
    for chunk in _chunks(targets):
        statistics = _from_images(program, chunk, prepared, seed)
        for target in chunk:
            yield statistics.pop(target.conv.name)


def _chunks(targets: list[PlanTarget]) -> Iterator[list[PlanTarget]]:
    """Consecutive targets whose moments together take at most `MAX_BYTES`, or single targets."""
    chunk: list[PlanTarget] = []
    chunk_bytes = 0
    for target in targets:
        target_bytes = 8 * target.conv.outputs**2 * (2 + _needs_pairs(target) * target.rule.dw_size**2)
        if chunk and chunk_bytes + target_bytes > MAX_BYTES:
            yield chunk
            chunk, chunk_bytes = [], 0
        chunk.append(target)
        chunk_bytes += target_bytes
    if chunk:
        yield chunk


def _needs_pairs(target: PlanTarget) -> bool:
    """Whether the predicted error of its forms of ghosts follows from pairs of maps."""
    return any(_is_predicted_by_pairs(form) for form in target.rule.forms)


def _is_predicted_by_pairs(form: type[GhostForm]) -> bool:
    if form is Depthwise or form is Grouped:
        return True
    if form is Pointwise:
        return False
    assert_never(form)


def _data_free(program: Program, targets: list[PlanTarget]) -> Iterator[LayerStatistics]:
    """Statistics under independent inputs, with the variances that the preceding BatchNorms imply.

    The outputs of every layer have the same total weight.
    """
    indices = {path: GraphIndex(graph) for path, graph in program.subgraphs.items()}
    input_stats = {path: input_channel_stats(graph) for path, graph in program.subgraphs.items()}
    for target in targets:
        path, nodes = target.conv.subgraph_path, [call.node for call in target.conv.calls]
        conv = program.conv(target.conv.name)
        norm = batchnorm_at(program.subgraphs[path], following_norm(indices[path], nodes))
        inputs = input_stats[path].get(nodes[0])
        joint = data_free_statistics(conv, norm, 1, inputs=inputs)
        assert isinstance(joint, JointStatistics)
        maps = None
        if _needs_pairs(target):
            maps = data_free_statistics(conv, norm, target.rule.dw_size, inputs=inputs, map_by_map=True)
        assert not isinstance(maps, JointStatistics)
        weights = 1 / joint.var.clamp_min(1e-12 * joint.var.max() + 1e-30) / len(joint.var)
        yield LayerStatistics((joint.gram[0, :, 0],), maps, torch.diag(weights))


def _from_images(
    program: Program, targets: list[PlanTarget], calibration: PreparedCalibration, seed: int
) -> dict[str, LayerStatistics]:
    """Statistics by name, from one forward of the original over the calibration images, and from the sensitivity.

    Those of convolutions that no image reaches are data-free.
    """
    images = calibration.batches.images
    by_node = {(t.conv.subgraph_path, call.node): t for t in targets for call in t.conv.calls}
    halves = {t.conv.name: [Moments.zero(t.conv.outputs, 0) for _ in range(2)] for t in targets}
    maps = {t.conv.name: PerMapMoments.zero(t.conv.outputs, t.rule.dw_size**2) for t in targets if _needs_pairs(t)}

    def on_call(first: int, path: str, node: fx.Node, _: Tensor, output: Tensor) -> None:
        target = by_node.get((path, node.name))
        if target is None:
            return
        name, size = target.conv.name, target.rule.dw_size
        add_by_halves(halves[name], output, first, images, seed)
        if name in maps:
            outputs, side = output.float().cpu(), math.ceil(patches.positions_per_map(MAP_POSITIONS, images) ** 0.5)
            crop = patches.random_crop(IDENTITY, outputs, outputs, side, size, seed + first)
            check_range(crop.padded_input, first)
            maps[name].add(patches.unfold_neighbours(crop.padded_input, size), patches.flatten_positions(crop.target))

    visit_convs(program, calibration, on_call)
    reduced = {name: [moments.all_reduced() for moments in pair] for name, pair in halves.items()}
    unreached = [t for t in targets if not any(m.count for m in reduced[t.conv.name])]
    statistics = {t.conv.name: s for t, s in zip(unreached, _data_free(program, unreached), strict=True)}
    for name, moments_of_halves in reduced.items():
        if name in statistics:
            continue
        whole, covariances = covariances_of(moments_of_halves)
        pairs = map_statistics(maps[name].all_reduced()) if name in maps else None
        statistics[name] = LayerStatistics(covariances, pairs, conv_error_metric(calibration, name, whole))
    return statistics
