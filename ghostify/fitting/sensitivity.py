"""Sensitivity of the model's outputs to errors in each convolution's output channels, on calibration images."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.errors import GhostifyError
from ghostify.fitting import patches
from ghostify.fitting.batch_checks import an_iterable
from ghostify.fitting.calibration import CalibrationBatches, bind_calibration, count_images, split
from ghostify.fitting.distributed import all_reduce_sum
from ghostify.graph.batches import run_batch
from ghostify.graph.batchnorm import BatchNorm, gamma_beta
from ghostify.graph.inputs import CallInputs, tensor_leaves
from ghostify.graph.model_copy import copy_module
from ghostify.graph.observation import intercept_convs
from ghostify.graph.program import Program
from ghostify.numerics import derive_seed
from ghostify.user_warnings import warn_user

IMAGE_DIVISOR = 8
MIN_IMAGES = 16
MAX_IMAGES = 256
DEFAULT_PROBES = 2
DEVIATION_IMAGES = 8
IMAGES_PER_PASS = 8
MAX_POSITIONS = 256
OFF_DIAGONAL_SHRINKAGE = 0.1
MIN_RELATIVE_DIAGONAL = 1e-3
MIN_RELATIVE_WEIGHT = 1e-6

Sensitivity = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class PreparedCalibration:
    """Calibration batches, the sensitivity of the outputs on them by convolution, and the seconds for computing it."""

    batches: CalibrationBatches
    sensitivity: Sensitivity
    seconds: float


def a_calibration(name: str, value: Any) -> Any:
    """Calibration batches, prepared or not; a check of arguments."""
    return value if isinstance(value, PreparedCalibration | CalibrationBatches) else an_iterable(name, value)


def prepare_calibration(
    program: Program, calibration: Iterable[Any] | PreparedCalibration, seed: int = 0
) -> PreparedCalibration:
    """The batches of `calibration` and the sensitivities of the outputs on them, for planning and fitting."""
    if isinstance(calibration, PreparedCalibration):
        return calibration
    batches, started = bind_calibration(program.module, calibration, program.example), time.perf_counter()
    sensitivity = output_sensitivity(program, batches, seed=seed)
    return PreparedCalibration(batches, sensitivity, time.perf_counter() - started)


def output_sensitivity(
    program: Program,
    batches: CalibrationBatches,
    *,
    images: int | None = None,
    probes: int = DEFAULT_PROBES,
    seed: int = 0,
) -> Sensitivity:
    """Sensitivity of the model's relative squared output error to errors of the channels (n x n), by convolution.

    Errors with covariance E between channels at every position increase the outputs' squared error, relative to their
    variance over images, by about trace(G E). G is the sum over positions of g g', where g is the gradient of a random
    combination of the outputs, averaged over `probes` combinations and the first `images` images (default: an eighth of
    them, 16 to 256). This is Hutchinson's estimator; errors are assumed to be independent of gradients and of errors at
    other positions (as in K-FAC, Martens and Grosse 2015). Large maps are sampled at `MAX_POSITIONS` positions. Values
    of the outputs that are not finite do not count; warns of NaN. Empty where the outputs have no values, another
    number of tensors for other images, or no gradient, and where the model overwrites values that the gradient needs.
    """
    images = min(max(-(-batches.images // IMAGE_DIVISOR), MIN_IMAGES), MAX_IMAGES) if images is None else images
    convs = [c for c in program.convolutions if c.unsupported_reason is None and c.groups == 1]
    names = {(c.subgraph_path, call.node): c.name for c in convs for call in c.calls}
    module = copy_module(program.module).eval().requires_grad_(False)
    deviations = output_deviations(module, first_images(batches, min(images, DEVIATION_IMAGES)))
    sums = {c.name: torch.zeros(c.outputs, c.outputs, dtype=torch.float64) for c in convs}
    failed = torch.zeros(())
    for few in first_images(batches, images):
        probe_zeros: list[tuple[str, Tensor]] = []
        with (
            torch.enable_grad(),
            intercept_convs(module, program.subgraphs, partial(_add_gradient_probe, names, probe_zeros)),
        ):
            outputs = _float_outputs(module, few)
        if not outputs or len(outputs) != len(deviations):
            failed += 1
            break
        for probe in range(probes if probe_zeros else 0):
            directions = [_random_direction(o, derive_seed(seed * probes + probe, few.first)) for o in outputs]
            try:
                total = torch.stack(
                    [(d * o).sum() / s for d, o, s in zip(directions, outputs, deviations, strict=True)]
                ).sum()
                gradients = torch.autograd.grad(
                    total, [zero for _, zero in probe_zeros], retain_graph=probe < probes - 1, allow_unused=True
                )
            except RuntimeError:
                failed += 1
                break
            for (name, _), gradient in zip(probe_zeros, gradients, strict=True):
                if gradient is not None:
                    sums[name] += few.weight * _channel_products(gradient, seed)
    if all_reduce_sum(failed)[0]:
        return {}
    gradient_count = probes * min(images, batches.images)
    means = {name: (all_reduce_sum(total)[0] / gradient_count).float() for name, total in sums.items()}
    return {name: mean for name, mean in means.items() if mean.any() and mean.isfinite().all()}


def error_metric(sensitivity: Tensor) -> Tensor:
    """A positive definite metric for errors from a sensitivity (n x n, float64).

    The elements off the diagonal, which are estimated on few images, are shrunk; those on it are at least
    `MIN_RELATIVE_DIAGONAL` times their mean.
    """
    sensitivity = sensitivity.double()
    diagonal = sensitivity.diagonal()
    floored = diagonal.clamp_min(MIN_RELATIVE_DIAGONAL * diagonal.mean() + torch.finfo(torch.float32).tiny)
    factor = 1 - OFF_DIAGONAL_SHRINKAGE
    return factor * sensitivity + torch.diag(floored - factor * diagonal)


def channel_weights(norm: BatchNorm | None, outputs: int) -> Tensor:
    """Weights of the squared errors of the outputs (n): gamma^2 / sigma^2 of a following BatchNorm, else 1; also 1
    where gamma is 0 in all channels."""
    if norm is None or norm.running_var is None:
        return torch.ones(outputs, dtype=torch.float64)
    gamma, _ = gamma_beta(norm)
    weight = 1 / (norm.running_var.double().cpu() + norm.eps) * gamma.double().cpu().square()
    return weight.clamp_min(MIN_RELATIVE_WEIGHT * weight.mean()) if weight.any() else torch.ones_like(weight)


def _channel_products(gradient: Tensor, seed: int) -> Tensor:
    """Sums over positions of products between channels (n x n), estimated from some positions where maps are large."""
    _, rows, columns = patches.sample_positions(gradient[:1].shape, MAX_POSITIONS, seed)
    samples = gradient[:, :, rows, columns].transpose(0, 1).flatten(1)
    return (samples @ samples.T).double().cpu() * (gradient[0, 0].numel() / len(rows))


def _add_gradient_probe(
    names: Mapping[tuple[str, str], str],
    probe_zeros: list[tuple[str, Tensor]],
    path: str,
    node: fx.Node,
    _: Tensor,
    output: Tensor,
) -> Tensor:
    """The output plus zeros, with respect to which gradients are taken."""
    if (path, node.name) not in names:
        return output
    zero = torch.zeros_like(output, requires_grad=True)
    probe_zeros.append((names[path, node.name], zero))
    return output + zero


@dataclass(frozen=True, eq=False)
class FewImages:
    """Some images of calibration batch `number`, from image `first` of the calibration set on."""

    number: int
    first: int
    inputs: CallInputs
    weight: float = 1.0


def first_images(batches: CalibrationBatches, images: int) -> Iterator[FewImages]:
    """This process's share of the first `images` images, few at a time.

    A process without any of them yields another image with weight 0, so that all processes compute the same sums.
    """
    local_batches = [batch for batch in batches.local_batches if batch.first < images]
    if not local_batches:
        batch = batches.local_batches[0]
        yield FewImages(batch.number, batch.first, split(batch.inputs, 1)[0], 0.0)
    for batch in local_batches:
        first, batch_inputs = batch.first, split(batch.inputs, images - batch.first)[0]
        for inputs in split(batch_inputs, IMAGES_PER_PASS):
            yield FewImages(batch.number, first, inputs)
            first += count_images(inputs)


def _float_outputs(module: nn.Module, few: FewImages) -> list[Tensor]:
    """The outputs with fractions, 0 where they are not finite; none where the model does not run on few images."""
    try:
        outputs = run_batch(module, few.inputs, few.number)
    except GhostifyError:
        return []
    tensors = [o for o in tensor_leaves(outputs) if o.is_floating_point()]
    return [o if o.isfinite().all() else _finite_values(o, few) for o in tensors]


def _finite_values(output: Tensor, few: FewImages) -> Tensor:
    if output.isnan().any():
        warn_user(
            f"calibration batch {few.number}: the model's outputs have NaN values. They do not count for the "
            "sensitivity of the outputs."
        )
    return torch.where(output.isfinite(), output, 0)


def output_deviations(module: nn.Module, batches: Iterable[FewImages]) -> list[Tensor]:
    """The standard deviation of each output over images, of all its values together; for one image, its norm."""
    count, sums, squares = torch.zeros(()), [], []
    for few in batches:
        with torch.no_grad():
            outputs = _float_outputs(module, few)
        count += few.weight * count_images(few.inputs)
        sums.append([few.weight * (o.double().sum(0) if o.dim() else o.double()) for o in outputs])
        squares.append([few.weight * o.double().square().sum() for o in outputs])
    count = all_reduce_sum(count)[0]
    if len({len(batch_sums) for batch_sums in sums}) > 1:
        return []
    deviations = []
    for output_sums, output_squares in zip(zip(*sums, strict=True), zip(*squares, strict=True), strict=True):
        has_mean = count > 1 and len({s.shape for s in output_sums}) == 1
        mean = all_reduce_sum(torch.stack(output_sums).sum(0))[0] / count if has_mean else torch.zeros(())
        power = all_reduce_sum(torch.stack(output_squares).sum())[0] / count
        deviations.append((power - mean.square().sum()).clamp_min(1e-6 * power + 1e-30).sqrt().float())
    return deviations


def _random_direction(output: Tensor, seed: int) -> Tensor:
    """Normal values, which for an image do not depend on its position in the batch."""
    if output.dim() == 0 or len(output) == 0:
        return torch.ones_like(output)
    values = [
        torch.randn(output.shape[1:], generator=torch.Generator().manual_seed((seed + k) % 2**64))
        for k in range(len(output))
    ]
    return torch.stack(values).to(output)
