"""The ranking of each channel group's channels, and the predicted error of pruning all but the first of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ghostify.fitting.moments import Moments
from ghostify.fitting.sensitivity import PreparedCalibration
from ghostify.fitting.subset_selection import greedy_order, selection_error
from ghostify.graph.neighbours import following_norm_of
from ghostify.graph.program import Convolution, Program
from ghostify.pruning.pruning_groups import PruningGroup
from ghostify.search.halves import add_by_halves, conv_error_metric, covariances_of, mean_across_halves, visit_convs


@dataclass(frozen=True, eq=False)
class ConsumerStatistics:
    """Statistics of n inputs of one consumer: of all, or of those that are a group's channels.

    `whole` is their covariance (n x n) on all images, `covariances` those on either half; `importance` weighs their
    errors (n x n); `rows` counts the samples.
    """

    whole: Tensor
    covariances: tuple[Tensor, ...]
    importance: Tensor
    rows: float

    def of_range(self, start: int, count: int) -> ConsumerStatistics:
        """The statistics of `count` inputs from `start` on."""
        inputs = slice(start, start + count)
        covariances = tuple(c[inputs, inputs] for c in self.covariances)
        return ConsumerStatistics(self.whole[inputs, inputs], covariances, self.importance[inputs, inputs], self.rows)

    def loss(self, kept: Sequence[int]) -> float:
        """The error of the model's outputs that a consumer adds with only the `kept` inputs: fitted to one half of the
        images, tested on the other."""
        rows = self.rows / len(self.covariances)
        return mean_across_halves(
            self.covariances, lambda fitted, tested: selection_error(kept, fitted, tested, self.importance, rows)
        )


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """A group's channels, ranked by importance, and their statistics as inputs of each of its consumers."""

    group: PruningGroup
    ranking: Sequence[int]
    consumers: tuple[ConsumerStatistics, ...]

    def kept(self, count: int) -> tuple[int, ...]:
        """The first `count` channels of the ranking, in the original's order."""
        return tuple(sorted(self.ranking[:count]))

    def loss(self, count: int) -> float:
        """The predicted error of the model's outputs with `count` channels kept, summed over the consumers."""
        kept = self.kept(count)
        return sum(consumer.loss(kept) for consumer in self.consumers)


def compute_group_statistics(
    program: Program, groups: Iterable[PruningGroup], calibration: PreparedCalibration, seed: int
) -> list[GroupStatistics]:
    """The statistics of the groups whose consumers are all reached by calibration images; runs one forward of them."""
    groups = list(groups)
    consumers = {(g.subgraph_path, read.node): (conv, read.width) for g in groups for conv, read in g.refitted}
    inputs = {
        key: [Moments.zero(conv.inputs // width, 0) for _ in range(2)] for key, (conv, width) in consumers.items()
    }
    outputs = {key: Moments.zero(conv.outputs, 0) for key, (conv, _) in consumers.items()}

    def on_call(first: int, part: str, node: fx.Node, image: Tensor, output: Tensor) -> None:
        key = part, node.name
        if key in consumers:
            conv, width = consumers[key]
            image = image if width == 1 else image.reshape(len(image), conv.inputs // width, width, 1)
            add_by_halves(inputs[key], image, first, calibration.batches.images, seed)
            add_by_halves([outputs[key]] * 2, output, first, calibration.batches.images, seed)

    visit_convs(program, calibration, on_call)
    statistics = {}
    for key, (conv, _) in consumers.items():
        halves, output_moments = [m.all_reduced() for m in inputs[key]], outputs[key].all_reduced()
        if output_moments.count:
            statistics[conv.name] = _consumer_statistics(program, conv, halves, output_moments, calibration)
    reached = [group for group in groups if all(conv.name in statistics for conv, _ in group.refitted)]
    return [
        _group_statistics(
            group, tuple(statistics[conv.name].of_range(read.start, read.count) for conv, read in group.refitted)
        )
        for group in reached
    ]


def _group_statistics(group: PruningGroup, consumers: tuple[ConsumerStatistics, ...]) -> GroupStatistics:
    ranking = greedy_order([c.whole for c in consumers], [c.importance for c in consumers])
    return GroupStatistics(group, ranking, consumers)


def _consumer_statistics(
    program: Program,
    consumer: Convolution,
    halves: list[Moments],
    output_moments: Moments,
    calibration: PreparedCalibration,
) -> ConsumerStatistics:
    """Errors of an input are weighed by the filters that read it and by the sensitivity to the filters' outputs.

    `halves` count the inputs of a linear layer that are one channel as one. The taps of a kernel are treated as
    independent; a common factor then matches the actual variance of the outputs.
    """
    conv = program.conv(consumer.name)
    free_mean = consumer.bias or following_norm_of(program, consumer) is not None  # absorbs the means of pruned inputs
    whole, covariances = covariances_of(halves, free_mean=free_mean)
    output_covariance = (output_moments.centred() if free_mean else output_moments.raw())[0]
    metric = conv_error_metric(calibration, consumer.name, output_covariance)
    filters = conv.weight.detach().double().cpu().reshape(conv.out_channels, len(whole), -1)
    importance = torch.einsum("oit,op,pjt->ij", filters, metric, filters)
    independent = float((importance * whole).sum())
    importance *= float((metric * output_covariance).sum()) / max(independent, 1e-300)
    rows = float(sum(m.count for m in halves))
    return ConsumerStatistics(whole, covariances, importance, rows)
