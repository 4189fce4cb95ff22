"""What planning knows of each link: which of its maps to keep, how many so ever, and the error that this adds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ghostify.budgeting.halves import (
    add_by_halves,
    covariances_of,
    error_metric,
    mean_across_halves,
    visit_convolutions,
)
from ghostify.fitting.moments import Moments
from ghostify.fitting.sensitivity import Calibration
from ghostify.fitting.subset import greedy_order, loss_of
from ghostify.planning.links import Link
from ghostify.tracing.program import Program
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
        kept, rows = self.kept(count), self.rows / len(self.covariances)
        return mean_across_halves(
            self.covariances, lambda fitted, tested: loss_of(kept, fitted, tested, self.importance, rows)
        )


def thinnings_of(program: Program, links: Iterable[Link], calibration: Calibration, seed: int) -> list[Thinning]:
    """Those of the links whose consumer the calibration images reach, by one forward of the original."""
    known = {(link.consumer.part, link.consumer.calls[0].node): link for link in links}
    inputs = {key: [Moments.zero(link.maps, 0) for _ in range(2)] for key, link in known.items()}
    outputs = {key: Moments.zero(link.consumer.outputs, 0) for key, link in known.items()}

    def on_call(first: int, part: str, node: fx.Node, image: Tensor, output: Tensor) -> None:
        key = part, node.name
        if key in known:
            add_by_halves(inputs[key], image, first, calibration.batches.images, seed)
            add_by_halves([outputs[key]] * 2, output, first, calibration.batches.images, seed)

    visit_convolutions(program, calibration, on_call)
    found = []
    for key, link in known.items():
        halves, made = [m.of_all_processes() for m in inputs[key]], outputs[key].of_all_processes()
        if made.count:
            found.append(_thinning(program, link, halves, made, calibration))
    return found


def _thinning(program: Program, link: Link, halves: list[Moments], made: Moments, calibration: Calibration) -> Thinning:
    """Errors of an input count by the filters that read it and by what the outputs feel of those.

    Places of a kernel count as if independent, and are brought to the size that outputs have in truth.
    """
    conv = program.conv(link.consumer.name)
    free_mean = link.consumer.bias or norm_behind(program, link.consumer) is not None  # takes up what is left out
    whole, covariances = covariances_of(halves, free_mean=free_mean)
    spread = (made.centred() if free_mean else made.raw())[0]
    metric = error_metric(calibration, link.consumer.name, spread)
    filters = conv.weight.detach().double().cpu().flatten(2)
    importance = torch.einsum("oit,op,pjt->ij", filters, metric, filters)
    alone = float((importance * whole).sum())
    importance *= float((metric * spread).sum()) / max(alone, 1e-300)
    rows = float(sum(m.count for m in halves))
    return Thinning(link, greedy_order(whole, importance), covariances, importance, rows)
