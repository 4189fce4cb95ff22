"""How much the model's outputs feel an error in each convolution's output channels, on calibration images."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.fitting import patches
from ghostify.fitting.calibration import CalibrationBatches, bind_calibration, count_images, split
from ghostify.fitting.distributed import all_reduce_sum
from ghostify.graph.inputs import CallInputs, call_model, tensor_leaves
from ghostify.graph.observation import intercept_convs
from ghostify.graph.program import Program
from ghostify.numerics import derive_seed

SHARE = 8
LEAST_IMAGES = 16
IMAGES = 256
PROBES = 2
SPREAD_OVER = 8
IMAGES_PER_PASS = 8
POSITIONS = 256
SHRINK = 0.1
LEAST = 1e-3

Sensitivity = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration batches, what the outputs feel on them of an error in each convolution, and the seconds that took."""

    batches: CalibrationBatches
    sensitivity: Sensitivity
    seconds: float


def prepare_calibration(program: Program, calibration: Iterable[Any] | Calibration, seed: int = 0) -> Calibration:
    """What planning and fitting share: the batches of `calibration` and the sensitivities of the outputs on them."""
    if isinstance(calibration, Calibration):
        return calibration
    batches, started = bind_calibration(program.module, calibration), time.perf_counter()
    sensitivity = output_sensitivity(program, batches, seed=seed)
    return Calibration(batches, sensitivity, time.perf_counter() - started)


def output_sensitivity(
    program: Program, batches: CalibrationBatches, *, images: int | None = None, probes: int = PROBES, seed: int = 0
) -> Sensitivity:
    """By convolution, how the model's outputs' relative squared error follows from errors of its channels (n x n).

    Errors with covariance E between channels at every position raise the outputs' squared error, relative to their
    variance over images, by about trace(G E): G is the sum over positions of g g', g being the gradient of a random
    combination of the outputs, averaged over combinations and the first `images` images (default: an eighth of them,
    16 to 256); Hutchinson's estimator, with errors taken as independent of gradients and of those at other positions
    (as in K-FAC, Martens and Grosse 2015). Large maps are sampled at POSITIONS places. Empty where the outputs have no
    gradient, or the model overwrites what a gradient would need.
    """
    images = min(max(-(-batches.images // SHARE), LEAST_IMAGES), IMAGES) if images is None else images
    dense = [c for c in program.convolutions if c.unsupported_reason is None and c.groups == 1]
    names = {(c.subgraph_path, call.node): c.name for c in dense for call in c.calls}
    module = copy.deepcopy(program.module).eval().requires_grad_(False)
    spreads = _output_deviations(module, _first(batches, min(images, SPREAD_OVER)))
    sums = {c.name: torch.zeros(c.outputs, c.outputs, dtype=torch.float64) for c in dense}
    failed = torch.zeros(())
    for first, counts, inputs in _first(batches, images):
        taps: list[tuple[str, Tensor]] = []
        with torch.enable_grad(), intercept_convs(module, program.subgraphs, partial(_add_gradient_probe, names, taps)):
            outputs = _tensors(call_model(module, inputs))
        if len(outputs) != len(spreads):
            failed += 1
            break
        for probe in range(probes):
            drawn = [_draw(o, derive_seed(seed * probes + probe, first)) for o in outputs]
            try:
                total = torch.stack([(d * o).sum() / s for d, o, s in zip(drawn, outputs, spreads, strict=True)]).sum()
                gradients = torch.autograd.grad(
                    total, [zero for _, zero in taps], retain_graph=probe < probes - 1, allow_unused=True
                )
            except RuntimeError:
                failed += 1
                break
            for (name, _), gradient in zip(taps, gradients, strict=True):
                if gradient is not None:
                    sums[name] += counts * _products(gradient, seed)
    if all_reduce_sum(failed)[0]:
        return {}
    seen = probes * min(images, batches.images)
    found = {name: (all_reduce_sum(total)[0] / seen).float() for name, total in sums.items()}
    return {name: sensitivity for name, sensitivity in found.items() if sensitivity.any()}


def error_metric(sensitivity: Tensor) -> Tensor:
    """A sensitivity as a metric for errors (n x n, float64, positive definite): what channels feel together counts a
    little less than few images say, and no channel less than LEAST of the mean."""
    sensitivity = sensitivity.double()
    own = sensitivity.diagonal()
    floored = own.clamp_min(LEAST * own.mean() + torch.finfo(torch.float32).tiny)
    return (1 - SHRINK) * sensitivity + torch.diag(floored - (1 - SHRINK) * own)


def _products(gradient: Tensor, seed: int) -> Tensor:
    """The sum over positions of products between channels (n x n), from some places where the maps are large."""
    places = patches.sample_positions(gradient[:1].shape, POSITIONS, seed)
    rows = gradient[:, :, places[1], places[2]].transpose(0, 1).flatten(1)
    return (rows @ rows.T).double().cpu() * (gradient[0, 0].numel() / len(places[1]))


def _add_gradient_probe(
    names: Mapping[tuple[str, str], str],
    taps: list[tuple[str, Tensor]],
    part: str,
    node: fx.Node,
    _: Tensor,
    output: Tensor,
) -> Tensor:
    """The output plus a zero by which gradients can be taken."""
    if (part, node.name) not in names:
        return output
    zero = torch.zeros_like(output, requires_grad=True)
    taps.append((names[part, node.name], zero))
    return output + zero


def _first(batches: CalibrationBatches, images: int) -> Iterator[tuple[int, float, CallInputs]]:
    """Of this process, the images with numbers below `images`, few at a time: the first one's number, 1, the inputs.

    A process that has none of them yields a stand-in with a 0, so that all take part in the same sums.
    """
    mine = [batch for batch in batches.local_batches if batch.first < images]
    if not mine:
        yield batches.local_batches[0].first, 0.0, split(batches.local_batches[0].inputs, 1)[0]
    for batch in mine:
        first, part = batch.first, split(batch.inputs, images - batch.first)[0]
        for inputs in split(part, IMAGES_PER_PASS):
            yield first, 1.0, inputs
            first += count_images(inputs)


def _tensors(outputs: Any) -> list[Tensor]:
    return [o for o in tensor_leaves(outputs) if o.is_floating_point()]


def _output_deviations(module: nn.Module, batches: Iterable[tuple[int, float, CallInputs]]) -> list[Tensor]:
    """The standard deviation of each output over images, all its values together; of one image, its size."""
    count, sums, squares = torch.zeros(()), [], []
    for _, counts, inputs in batches:
        with torch.no_grad():
            outputs = _tensors(call_model(module, inputs))
        count += counts * count_images(inputs)
        sums.append([counts * (o.double().sum(0) if o.dim() else o.double()) for o in outputs])
        squares.append([counts * o.double().square().sum() for o in outputs])
    count = all_reduce_sum(count)[0]
    if len({len(own) for own in sums}) > 1:
        return []
    spreads = []
    for mine, square in zip(zip(*sums, strict=True), zip(*squares, strict=True), strict=True):
        alike = count > 1 and len({m.shape for m in mine}) == 1
        mean = all_reduce_sum(torch.stack(mine).sum(0))[0] / count if alike else torch.zeros(())
        power = all_reduce_sum(torch.stack(square).sum())[0] / count
        spreads.append((power - mean.square().sum()).clamp_min(1e-6 * power + 1e-30).sqrt().float())
    return spreads


def _draw(output: Tensor, seed: int) -> Tensor:
    """Normal values, the same for an image wherever it stands in a batch."""
    if output.dim() == 0:
        return torch.ones_like(output)
    each = [
        torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(seed + k)) for k in range(len(output))
    ]
    return torch.stack(each).to(output)
