"""Covariances of each half of the calibration images, for predictions fitted to one half and tested on the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, fx

from ghostify.errors import GhostifyError
from ghostify.fitting import patches
from ghostify.fitting.moments import Moments
from ghostify.fitting.sensitivity import PreparedCalibration, error_metric
from ghostify.graph.batches import run_batch
from ghostify.graph.modes import eval_mode
from ghostify.graph.observation import intercept_convs
from ghostify.graph.program import Program

POSITIONS = 20_000

Error = TypeVar("Error", Tensor, float)


def visit_convs(
    program: Program, calibration: PreparedCalibration, on_call: Callable[[int, str, fx.Node, Tensor, Tensor], None]
) -> None:
    """One forward of the original over the calibration images of this process.

    `on_call` gets the number of a batch's first image, the path of the subgraph, the node of a convolution, its input
    and its output.
    """

    def callback(first: int, part: str, node: fx.Node, image: Tensor, output: Tensor) -> Tensor:
        on_call(first, part, node, image, output)
        return output

    with eval_mode(program.module):
        for batch in calibration.batches.local_batches:
            with intercept_convs(program.module, program.subgraphs, partial(callback, batch.first)):
                run_batch(program.module, batch.inputs, batch.number)


def add_by_halves(halves: Sequence[Moments], maps: Tensor, first: int, images: int, seed: int) -> None:
    """Add maps (N x n x H x W) at sampled positions: those of even image numbers to `halves[0]`, of odd to `halves[1]`.

    `first` is the number of the first image, `images` the size of the whole set. Raises `GhostifyError` for values that
    are not finite or whose squares overflow.
    """
    maps = maps.float().cpu()
    positions = patches.sample_positions(maps.shape, patches.positions_per_map(POSITIONS, images), seed + first)
    rows, parity = patches.gather_positions(maps, positions), (positions[0] + first) % 2
    check_range(rows, first)
    for half, moments in enumerate(halves):
        of_half = rows[parity == half]
        moments.add(of_half, of_half[:, :0])


def check_range(values: Tensor, first: int) -> None:
    """Raises `GhostifyError`, with the number of the first image, for values whose sum of squares is not finite."""
    if not values.norm().square().isfinite():
        raise GhostifyError(
            f"calibration: from image {first} on, values of a convolution are not finite or near overflow. Check these "
            "images, or use a dtype with a larger range."
        )


def covariances_of(halves: Sequence[Moments], *, free_mean: bool = True) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The covariance on all images (n x n), and those on each half; without a free mean, mean products instead.

    If one half is empty, the covariance on all images stands for both.
    """
    second = Moments.centred if free_mean else Moments.raw
    whole = second(halves[0] + halves[1])[0]
    return whole, tuple(second(m)[0] for m in halves) if all(m.count for m in halves) else (whole,)


def conv_error_metric(calibration: PreparedCalibration, name: str, covariance: Tensor) -> Tensor:
    """The metric of errors of a convolution's outputs (n x n): from its sensitivity, else equal weights relative to the
    sum of the outputs' variances."""
    if name in calibration.sensitivity:
        return error_metric(calibration.sensitivity[name], covariance.diagonal())
    total = covariance.diagonal().clamp_min(1e-30).sum()
    return torch.eye(len(covariance), dtype=torch.float64) / total


def mean_across_halves(halves: Sequence[Tensor], error: Callable[[Tensor, Tensor], Error]) -> Error:
    """The mean of `error(fitted, tested)` over the halves as `fitted`, with the other half as `tested`."""
    errors = [error(fitted, tested) for fitted, tested in zip(halves, reversed(halves), strict=True)]
    return sum(errors[1:], errors[0]) / len(errors)
