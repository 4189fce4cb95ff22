"""What planning knows of each channel group: which channels to keep, however many, and the error that this adds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ghostify.budgeting.profile import POSITIONS
from ghostify.fitting import sight
from ghostify.fitting.moments import Moments
from ghostify.fitting.sensitivity import Calibration, metric_of
from ghostify.fitting.subset import greedy_order, loss_of
from ghostify.pruning.pruning_groups import PruningGroup
from ghostify.tracing.calls import run
from ghostify.tracing.modes import evaluating
from ghostify.tracing.program import Convolution, Program
from ghostify.tracing.record import looking
from ghostify.tracing.wiring import norm_behind


@dataclass(frozen=True, eq=False)
class Reading:
    """What one consumer reads of a group: covariances of the channels, on the whole (n x n) and on either half of the
    images, how errors of them count (n x n), and the rows that all of it was taken from."""

    whole: Tensor
    covariances: tuple[Tensor, ...]
    importance: Tensor
    rows: float

    def loss(self, kept: Sequence[int]) -> float:
        """The error of the model's outputs that the consumer adds where it reads `kept` only; what one half of the
        images teaches is judged on the other."""
        halves = self.covariances
        each = [
            loss_of(kept, own, other, self.importance, self.rows / len(halves))
            for own, other in zip(halves, reversed(halves), strict=True)
        ]
        return sum(each) / len(each)


@dataclass(frozen=True, eq=False)
class Thinning:
    """A group's channels in the order in which to keep them, and what each of its consumers reads of them."""

    group: PruningGroup
    order: Sequence[int]
    readings: tuple[Reading, ...]

    def kept(self, count: int) -> tuple[int, ...]:
        """The `count` channels to keep, in the original's order."""
        return tuple(sorted(self.order[:count]))

    def loss(self, count: int) -> float:
        """The error of the model's outputs that keeping so many adds, over all consumers."""
        kept = self.kept(count)
        return sum(reading.loss(kept) for reading in self.readings)


def thinnings_of(
    program: Program, groups: Iterable[PruningGroup], calibration: Calibration, seed: int
) -> list[Thinning]:
    """Those of the groups all of whose consumers the calibration images reach, by one forward of the original."""
    groups = list(groups)
    consumers = {(g.part, conv.calls[0].node): conv for g in groups for conv in g.consumers}
    inputs = {key: [Moments.zero(conv.inputs, 0) for _ in range(2)] for key, conv in consumers.items()}
    outputs = {key: Moments.zero(conv.outputs, 0) for key, conv in consumers.items()}

    def look(first: int, part: str, node: fx.Node, image: Any, output: Tensor) -> Tensor:
        key = part, node.name
        if key not in consumers:
            return output
        share = sight.share_of(POSITIONS, calibration.batches.images)
        for maps, sums in ((image.float().cpu(), inputs[key]), (output.float().cpu(), [outputs[key]] * 2)):
            places = sight.choose_places(maps.shape, share, seed + first)
            rows, odd = sight.values(maps, places), (places[0] + first) % 2
            for half, moments in enumerate(sums):
                moments.add(rows[odd == half], rows[odd == half][:, :0])
        return output

    with evaluating(program.module):
        for batch in calibration.batches.own:
            with looking(program.module, program.parts, partial(look, batch.first)):
                run(program.module, batch.inputs)
    readings = {}
    for key, conv in consumers.items():
        halves, made = [m.of_all_processes() for m in inputs[key]], outputs[key].of_all_processes()
        if made.count:
            readings[conv.name] = _reading(program, conv, halves, made, calibration.felt)
    reached = [group for group in groups if all(conv.name in readings for conv in group.consumers)]
    return [_thinning(group, tuple(readings[conv.name] for conv in group.consumers)) for group in reached]


def _thinning(group: PruningGroup, readings: tuple[Reading, ...]) -> Thinning:
    order = greedy_order([reading.whole for reading in readings], [reading.importance for reading in readings])
    return Thinning(group, order, readings)


def _reading(
    program: Program, consumer: Convolution, halves: list[Moments], made: Moments, felt: Mapping[str, Tensor]
) -> Reading:
    """Errors of an input count by the filters that read it and by what the outputs feel of those.

    Places of a kernel count as if independent, and are brought to the size that outputs have in truth.
    """
    conv = program.conv(consumer.name)
    free_mean = consumer.bias or norm_behind(program, consumer) is not None  # takes up what is left out
    moments = Moments.centred if free_mean else Moments.raw
    whole, spread = moments(halves[0] + halves[1])[0], moments(made)[0]
    metric = metric_of(felt[consumer.name]) if consumer.name in felt else None
    if metric is None:
        metric = torch.eye(len(spread), dtype=torch.float64) / spread.diagonal().sum().clamp_min(1e-30)
    filters = conv.weight.detach().double().cpu().flatten(2)
    importance = torch.einsum("oit,op,pjt->ij", filters, metric, filters)
    alone = float((importance * whole).sum())
    importance *= float((metric * spread).sum()) / max(alone, 1e-300)
    covariances = tuple(moments(m)[0] for m in halves) if all(m.count for m in halves) else (whole,)
    rows = float(sum(m.count for m in halves))
    return Reading(whole, covariances, importance, rows)
