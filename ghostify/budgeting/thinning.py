"""What planning knows of each link: which of its maps to keep, how many so ever, and the error that this adds."""

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
from ghostify.planning.links import Link
from ghostify.tracing.calls import run
from ghostify.tracing.modes import evaluating
from ghostify.tracing.program import Program
from ghostify.tracing.record import looking
from ghostify.tracing.wiring import norm_behind


@dataclass(frozen=True, eq=False)
class Thinning:
    """A link's maps in the order in which to keep them, their covariances on either half of the images, how errors of
    its consumer's inputs count (n x n), and the rows that all of it was seen in."""

    link: Link
    order: Sequence[int]
    covariances: tuple[Tensor, ...]
    importance: Tensor
    rows: float

    def kept(self, count: int) -> tuple[int, ...]:
        """The `count` maps to keep, in the original's order."""
        return tuple(sorted(self.order[:count]))

    def loss(self, count: int) -> float:
        """The error of the model's outputs that keeping so many adds; what one half of the images teaches is judged on
        the other."""
        kept, halves = self.kept(count), self.covariances
        each = [
            loss_of(kept, own, other, self.importance, self.rows / len(halves))
            for own, other in zip(halves, reversed(halves), strict=True)
        ]
        return sum(each) / len(each)


def thinnings_of(program: Program, links: Iterable[Link], calibration: Calibration, seed: int) -> list[Thinning]:
    """Those of the links whose consumer the calibration images reach, by one forward of the original."""
    known = {(link.consumer.part, link.consumer.calls[0].node): link for link in links}
    inputs = {key: [Moments.zero(link.maps, 0) for _ in range(2)] for key, link in known.items()}
    outputs = {key: Moments.zero(link.consumer.outputs, 0) for key, link in known.items()}

    def look(first: int, part: str, node: fx.Node, image: Any, output: Tensor) -> Tensor:
        key = part, node.name
        if key not in known:
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
    found = []
    for key, link in known.items():
        halves, made = [m.of_all_processes() for m in inputs[key]], outputs[key].of_all_processes()
        if made.count:
            found.append(_thinning(program, link, halves, made, calibration.felt))
    return found


def _thinning(
    program: Program, link: Link, halves: list[Moments], made: Moments, felt: Mapping[str, Tensor]
) -> Thinning:
    """Errors of an input count by the filters that read it and by what the outputs feel of those.

    Places of a kernel count as if independent, and are brought to the size that outputs have in truth.
    """
    conv = program.conv(link.consumer.name)
    free_mean = link.consumer.bias or norm_behind(program, link.consumer) is not None  # takes up what is left out
    moments = Moments.centred if free_mean else Moments.raw
    whole, spread = moments(halves[0] + halves[1])[0], moments(made)[0]
    metric = metric_of(felt[link.consumer.name]) if link.consumer.name in felt else None
    if metric is None:
        metric = torch.eye(len(spread), dtype=torch.float64) / spread.diagonal().sum().clamp_min(1e-30)
    filters = conv.weight.detach().double().cpu().flatten(2)
    importance = torch.einsum("oit,op,pjt->ij", filters, metric, filters)
    alone = float((importance * whole).sum())
    importance *= float((metric * spread).sum()) / max(alone, 1e-300)
    covariances = tuple(moments(m)[0] for m in halves) if all(m.count for m in halves) else (whole,)
    rows = float(sum(m.count for m in halves))
    return Thinning(link, greedy_order(whole, importance), covariances, importance, rows)
