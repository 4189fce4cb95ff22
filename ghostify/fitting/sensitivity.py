"""Sensitivity of the model's outputs to errors in each convolution's output channels, on calibration images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ghostify.errors import GhostifyError
from ghostify.fitting import patches
from ghostify.fitting.batch_checks import an_iterable
from ghostify.fitting.calibration import CalibrationBatches, FewImages, bind_calibration, first_images
from ghostify.fitting.distributed import all_reduce_sum
from ghostify.fitting.last_convolutions import ConvOutput, followed_convolutions
from ghostify.fitting.output_scale import (
    Importance,
    OutputScale,
    finite,
    finite_outputs,
    output_deviations,
    output_scale,
)
from ghostify.graph.batchnorm import BatchNorm, gamma_beta
from ghostify.graph.model_copy import copy_module
from ghostify.graph.observation import intercept_convs
from ghostify.graph.program import Program
from ghostify.numerics import derive_seed

IMAGE_DIVISOR = 8
MIN_IMAGES = 16
MAX_IMAGES = 256
DEFAULT_PROBES = 2
MAX_POSITIONS = 256
OFF_DIAGONAL_SHRINKAGE = 0.1
MIN_RELATIVE_DIAGONAL = 1e-3
MIN_RELATIVE_WEIGHT = 1e-6
MAX_NAMES = 3

Sensitivity = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class PreparedCalibration:
    """Calibration batches, the sensitivity of the outputs on them by convolution, the seconds for computing it, and the
    scale of the outputs. `notes` say where the outputs are not what errors are weighed by."""

    batches: CalibrationBatches
    sensitivity: Sensitivity
    seconds: float
    output_scale: OutputScale
    notes: tuple[str, ...] = ()


def a_calibration(name: str, value: Any) -> Any:
    """Calibration batches, prepared or not; a check of arguments."""
    return value if isinstance(value, PreparedCalibration | CalibrationBatches) else an_iterable(name, value)


def prepare_calibration(
    program: Program,
    calibration: Iterable[Any] | PreparedCalibration,
    seed: int = 0,
    importance: Importance | None = None,
) -> PreparedCalibration:
    """The batches of `calibration` and the sensitivities of the outputs on them, for planning and fitting.

    Where the outputs say nothing, as those of a detector that finds nothing, errors are weighed by their effect on the
    outputs of the last convolutions, or else equally. `importance` returns the tensors of the outputs that count.
    """
    if isinstance(calibration, PreparedCalibration):
        if importance is not None:
            raise GhostifyError("importance: is that of the prepared calibration. Pass it to prepare_calibration.")
        return calibration
    batches, started = bind_calibration(program.module, calibration, program.example), time.perf_counter()
    scale = output_scale(program.module, batches, importance)
    sensitivity = output_sensitivity(program, batches, scale, seed=seed)
    notes: tuple[str, ...] = ()
    if not sensitivity and program.convolutions:
        sensitivity, last = last_sensitivity(program, batches, seed)
        notes = (_note_on_outputs(last if sensitivity else ()),)
    return PreparedCalibration(batches, sensitivity, time.perf_counter() - started, scale, notes)


def prepare_optional(
    program: Program,
    calibration: Iterable[Any] | PreparedCalibration | None,
    seed: int,
    importance: Importance | None = None,
) -> PreparedCalibration | None:
    """`prepare_calibration` where there are images, None without; raises `GhostifyError` for importance without."""
    if calibration is None and importance is not None:
        raise GhostifyError("importance: needs calibration images. Pass calibration (--calibration FOLDER).")
    return None if calibration is None else prepare_calibration(program, calibration, seed, importance)


def output_sensitivity(
    program: Program,
    batches: CalibrationBatches,
    scale: OutputScale,
    *,
    images: int | None = None,
    probes: int = DEFAULT_PROBES,
    seed: int = 0,
) -> Sensitivity:
    """Sensitivity of the model's output error to errors of the channels (n x n), by convolution.

    Errors with covariance E between channels at every position increase the outputs' error (see `OutputScale.error`) by
    about trace(G E). G is the sum over positions of g g', where g is the gradient of a random combination of the
    outputs, averaged over `probes` combinations and the first `images` images (default: an eighth of them, 16 to 256).
    This is Hutchinson's estimator; errors are assumed to be independent of gradients and of errors at other positions
    (as in K-FAC, Martens and Grosse 2015). Large maps are sampled at `MAX_POSITIONS` positions. Values of the outputs
    that are not finite do not count; warns of NaN. Empty where the outputs have no values, another number of tensors
    for other images, or no gradient, and where the model overwrites values that the gradient needs.
    """
    model = _ModelWithProbes(program)
    run = partial(model.run, importance=scale.importance)
    return _sensitivity(model, run, batches, scale.deviations, images, probes, seed) if scale.deviations else {}


def last_sensitivity(program: Program, batches: CalibrationBatches, seed: int) -> tuple[Sensitivity, tuple[str, ...]]:
    """As `output_sensitivity`, of the outputs of the last convolutions: those that reach no other; and their names."""
    model = _ModelWithProbes(program)
    followed, called = torch.zeros(len(model.convs)), torch.zeros(len(model.convs))
    numbers = {conv.name: k for k, conv in enumerate(model.convs)}
    for few in first_images(batches, 1):
        _, calls = model.run(few)
        followed[[numbers[name] for name in followed_convolutions(calls)]] = 1
        called[[numbers[call.name] for call in calls]] = 1
    is_last = (all_reduce_sum(called)[0] > 0) & (all_reduce_sum(followed)[0] == 0)
    last = tuple(conv.name for conv, chosen in zip(model.convs, is_last.tolist(), strict=True) if chosen)

    def run(few: FewImages) -> tuple[list[Tensor], list[ConvOutput]]:
        _, calls = model.run(few)
        return [finite(call.after) for call in calls if call.name in last], calls

    with torch.no_grad():
        deviations = output_deviations(lambda few: [o.detach() for o in run(few)[0]], batches)
    return _sensitivity(model, run, batches, deviations, None, DEFAULT_PROBES, seed) if deviations else {}, last


def _sensitivity(
    model: _ModelWithProbes,
    run: Callable[[FewImages], tuple[list[Tensor], list[ConvOutput]]],
    batches: CalibrationBatches,
    deviations: Sequence[Tensor],
    images: int | None,
    probes: int,
    seed: int,
) -> Sensitivity:
    """The sensitivity of the outputs that `run` gives, whose errors are relative to `deviations`."""
    images = min(max(-(-batches.images // IMAGE_DIVISOR), MIN_IMAGES), MAX_IMAGES) if images is None else images
    sums = {c.name: torch.zeros(c.outputs, c.outputs, dtype=torch.float64) for c in model.convs}
    failed = torch.zeros(())
    for few in first_images(batches, images):
        outputs, calls = run(few)
        if not outputs or len(outputs) != len(deviations):
            failed += 1
            break
        for probe in range(probes if calls else 0):
            random_seed = derive_seed(seed * probes + probe, few.first)
            try:
                directions = [
                    _random_direction(o, random_seed) / s.to(o.device) for o, s in zip(outputs, deviations, strict=True)
                ]
                total = torch.stack([(d * o).sum() for d, o in zip(directions, outputs, strict=True)]).sum()
                gradients = torch.autograd.grad(
                    total, [call.zero for call in calls], retain_graph=probe < probes - 1, allow_unused=True
                )
            except RuntimeError:
                failed += 1
                break
            for call, gradient in zip(calls, gradients, strict=True):
                if gradient is not None:
                    sums[call.name] += few.weight * _channel_products(gradient, seed)
    if all_reduce_sum(failed)[0]:
        return {}
    gradient_count = probes * min(images, batches.images)
    means = {name: (all_reduce_sum(total)[0] / gradient_count).float() for name, total in sums.items()}
    return {name: mean for name, mean in means.items() if mean.any() and mean.isfinite().all()}


class _ModelWithProbes:
    """A copy of a program's model whose forwards also give the outputs of its convolutions, with gradients."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.module = copy_module(program.module).eval().requires_grad_(False)
        self.convs = [c for c in program.convolutions if c.unsupported_reason is None and c.groups == 1]
        self.names = {(c.subgraph_path, call.node): c.name for c in self.convs for call in c.calls}

    def run(self, few: FewImages, importance: Importance | None = None) -> tuple[list[Tensor], list[ConvOutput]]:
        """The outputs that count and the outputs of convolutions, on few images."""
        calls: list[ConvOutput] = []
        on_conv = partial(self._add_zero, calls)
        with torch.enable_grad(), intercept_convs(self.module, self.program.subgraphs, on_conv):
            return finite_outputs(self.module, few, importance), calls

    def _add_zero(self, calls: list[ConvOutput], path: str, node: fx.Node, _: Tensor, output: Tensor) -> Tensor:
        """The output plus zeros, with respect to which gradients are taken."""
        if (path, node.name) not in self.names:
            return output
        zero = torch.zeros_like(output, requires_grad=True)
        calls.append(ConvOutput(self.names[path, node.name], output, zero, output + zero))
        return calls[-1].after


def _note_on_outputs(last: Sequence[str]) -> str:
    """What errors are weighed by where the outputs say nothing."""
    names = ", ".join(last[:MAX_NAMES]) + (f" and {len(last) - MAX_NAMES} more" if len(last) > MAX_NAMES else "")
    return "the model's outputs have no values that vary, or no gradient, on the calibration images: errors count " + (
        f"by their effect on the outputs of the last convolutions ({names})"
        if last
        else "relative to the variance of each layer's own outputs"
    )


def error_metric(sensitivity: Tensor, variances: Tensor) -> Tensor:
    """A positive definite metric for errors from a sensitivity (n x n, float64) and the variances of the channels (n).

    The elements off the diagonal, which are estimated on few images, are shrunk; those on it are at least
    `MIN_RELATIVE_DIAGONAL` times their mean, but no more than makes the channel's variance cost that share of the mean:
    channels of large variance that do not change the outputs would otherwise cost more than all others.
    """
    sensitivity = sensitivity.double()
    diagonal = sensitivity.diagonal()
    tiny = torch.finfo(torch.float32).tiny
    mean_cost = (diagonal * variances).mean() / variances.clamp_min(tiny)
    floor = MIN_RELATIVE_DIAGONAL * torch.minimum(diagonal.mean(), mean_cost)
    floored = torch.maximum(diagonal, floor + tiny)
    factor = 1 - OFF_DIAGONAL_SHRINKAGE
    return factor * sensitivity + torch.diag(floored - factor * diagonal)


def channel_weights(norm: BatchNorm | None, outputs: int) -> Tensor:
    """Weights of the squared errors of the outputs (n): gamma^2 / sigma^2 of a following BatchNorm, else 1; also 1
    where gamma is 0 in all channels."""
    if norm is None or norm.running_var is None:
        return torch.ones(outputs, dtype=torch.float64)
    gamma, _ = gamma_beta(norm)
    weight = 1 / (norm.running_var.double().cpu() + norm.eps) * gamma.double().cpu().square()
    used = weight[weight > 0]  # the median: one norm without variance has a weight of any size
    return weight.clamp_min(MIN_RELATIVE_WEIGHT * used.median()) if len(used) else torch.ones_like(weight)


def _channel_products(gradient: Tensor, seed: int) -> Tensor:
    """Sums over positions of products between channels (n x n), estimated from some positions where maps are large."""
    _, rows, columns = patches.sample_positions(gradient[:1].shape, MAX_POSITIONS, seed)
    samples = gradient[:, :, rows, columns].transpose(0, 1).flatten(1)
    return (samples @ samples.T).double().cpu() * (gradient[0, 0].numel() / len(rows))


def _random_direction(output: Tensor, seed: int) -> Tensor:
    """Normal values, which for an image do not depend on its position in the batch."""
    if output.dim() == 0 or len(output) == 0:
        return torch.ones_like(output)
    values = [
        torch.randn(output.shape[1:], generator=torch.Generator().manual_seed((seed + k) % 2**64))
        for k in range(len(output))
    ]
    return torch.stack(values).to(output)
