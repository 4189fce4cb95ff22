"""What planning knows of each channel group: which channels to keep, however many, and the error that this adds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ghostify.fitting.moments import Moments
from ghostify.fitting.sensitivity import Calibration
from ghostify.fitting.subset_selection import greedy_order, selection_error
from ghostify.graph.neighbours import following_norm_of
from ghostify.graph.program import Convolution, Program
from ghostify.pruning.pruning_groups import PruningGroup
from ghostify.search.halves import add_by_halves, conv_error_metric, covariances_of, mean_across_halves, visit_convs


@dataclass(frozen=True, eq=False)
class ConsumerStatistics:
    """What one consumer reads of a group: covariances of the channels, on the whole (n x n) and on either half of the
    images, how errors of them count (n x n), and the rows that all of it was taken from."""

    whole: Tensor
    covariances: tuple[Tensor, ...]
    importance: Tensor
    rows: float

    def loss(self, kept: Sequence[int]) -> float:
        """The error of the model's outputs that the consumer adds where it reads `kept` only; what one half of the
        images teaches is tested on the other."""
        rows = self.rows / len(self.covariances)
        return mean_across_halves(
            self.covariances, lambda fitted, tested: selection_error(kept, fitted, tested, self.importance, rows)
        )


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """A group's channels in the order in which to keep them, and what each of its consumers reads of them."""

    group: PruningGroup
    ranking: Sequence[int]
    consumers: tuple[ConsumerStatistics, ...]

    def kept(self, count: int) -> tuple[int, ...]:
        """The `count` channels to keep, in the original's order."""
        return tuple(sorted(self.ranking[:count]))

    def loss(self, count: int) -> float:
        """The error of the model's outputs that keeping so many adds, over all consumers."""
        kept = self.kept(count)
        return sum(reading.loss(kept) for reading in self.consumers)


def compute_group_statistics(
    program: Program, groups: Iterable[PruningGroup], calibration: Calibration, seed: int
) -> list[GroupStatistics]:
    """Those of the groups all of whose consumers the calibration images reach, by one forward of the original."""
    groups = list(groups)
    consumers = {(g.subgraph_path, conv.calls[0].node): conv for g in groups for conv in g.consumers}
    inputs = {key: [Moments.zero(conv.inputs, 0) for _ in range(2)] for key, conv in consumers.items()}
    outputs = {key: Moments.zero(conv.outputs, 0) for key, conv in consumers.items()}

    def on_call(first: int, part: str, node: fx.Node, image: Tensor, output: Tensor) -> None:
        key = part, node.name
        if key in consumers:
            add_by_halves(inputs[key], image, first, calibration.batches.images, seed)
            add_by_halves([outputs[key]] * 2, output, first, calibration.batches.images, seed)

    visit_convs(program, calibration, on_call)
    readings = {}
    for key, conv in consumers.items():
        halves, made = [m.all_reduced() for m in inputs[key]], outputs[key].all_reduced()
        if made.count:
            readings[conv.name] = _reading(program, conv, halves, made, calibration)
    reached = [group for group in groups if all(conv.name in readings for conv in group.consumers)]
    return [_thinning(group, tuple(readings[conv.name] for conv in group.consumers)) for group in reached]


def _thinning(group: PruningGroup, readings: tuple[ConsumerStatistics, ...]) -> GroupStatistics:
    ranking = greedy_order([reading.whole for reading in readings], [reading.importance for reading in readings])
    return GroupStatistics(group, ranking, readings)


def _reading(
    program: Program, consumer: Convolution, halves: list[Moments], made: Moments, calibration: Calibration
) -> ConsumerStatistics:
    """Errors of an input count by the filters that read it and by what the outputs feel of those.

    Places of a kernel count as if independent, and are brought to the size that outputs have in truth.
    """
    conv = program.conv(consumer.name)
    free_mean = consumer.bias or following_norm_of(program, consumer) is not None  # takes up what is left out
    whole, covariances = covariances_of(halves, free_mean=free_mean)
    spread = (made.centred() if free_mean else made.raw())[0]
    metric = conv_error_metric(calibration, consumer.name, spread)
    filters = conv.weight.detach().double().cpu().flatten(2)
    importance = torch.einsum("oit,op,pjt->ij", filters, metric, filters)
    alone = float((importance * whole).sum())
    importance *= float((metric * spread).sum()) / max(alone, 1e-300)
    rows = float(sum(m.count for m in halves))
    return ConsumerStatistics(whole, covariances, importance, rows)
