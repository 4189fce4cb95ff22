"""The scale of the model's outputs: which of their tensors count, and the deviations that errors are divided by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghostify.arguments import call_function
from ghostify.errors import GhostifyError
from ghostify.fitting.calibration import CalibrationBatches, FewImages, count_images, first_images
from ghostify.fitting.distributed import all_gather_rows, all_reduce_sum
from ghostify.graph.batches import run_batch
from ghostify.graph.inputs import tensor_leaves
from ghostify.graph.modes import eval_mode
from ghostify.user_warnings import warn_user

DEVIATION_IMAGES = 64
MIN_RELATIVE_DEVIATION = 1e-2
COMMON_SCALE_FACTOR = 2.0
MAX_DIMENSIONS = 8
MIN_ROWS = 3
CHANNELS_AT_A_TIME = 1024


Importance = Callable[[Any], Any]
Run = Callable[[FewImages], list[Tensor]]


@dataclass(frozen=True, eq=False)
class OutputScale:
    """The deviation of each output tensor that counts; it broadcasts against the tensor for any number of images.

    Infinite where a tensor is 0 on all images: its errors do not count. Empty where nothing of the outputs counts. With
    `importance`, the tensors are those that it returns for the outputs.
    """

    deviations: tuple[Tensor, ...]
    importance: Importance | None = None

    def counted(self, outputs: Any) -> list[Tensor]:
        """The tensors of nested `outputs` that count; raises `GhostifyError` where they are not as many as usual."""
        tensors = counted_tensors(outputs, self.importance)
        if len(tensors) != len(self.deviations):
            raise GhostifyError(
                f"outputs: have {len(tensors)} floating-point tensors in one forward and {len(self.deviations)} in "
                "another. Use batches of equal size."
            )
        return tensors

    def error(self, expected: Any, actual: Any, images: int) -> Tensor:
        """The error of the outputs `actual` of `images` images, relative to their variance over images.

        The sum over tensors of the mean over images of sum(((actual - expected) / deviation)^2); 1 for a tensor whose
        values are all replaced by their means over images. Values that are not finite in `expected` do not count, and
        rows that only one of both has are compared with 0.
        """
        pairs = zip(self.counted(expected), self.counted(actual), self.deviations, strict=True)
        return torch.stack([(_difference(o, a) / s.to(o.device)).square().sum() for o, a, s in pairs]).sum() / images


def counted_tensors(outputs: Any, importance: Importance | None = None) -> list[Tensor]:
    """The floating-point tensors of nested outputs, in order, or of what `importance` returns for the outputs.

    Those of a list of dicts, as detectors return one for each image, become one tensor by key, with a row for each
    dict; tensors that differ in size are filled up with 0.
    """
    if importance is None:
        return [o for o in tensor_leaves(_joined(outputs)) if o.is_floating_point()]
    tensors = counted_tensors(call_function("importance", importance, outputs))
    if not tensors:
        raise GhostifyError("importance: returns no floating-point tensors. Return those of the outputs that count.")
    return tensors


def _joined(outputs: Any) -> Any:
    """A list of dicts of tensors as one dict of tensors; any other outputs as they are."""
    if not (isinstance(outputs, list) and outputs and all(isinstance(o, Mapping) for o in outputs)):
        return outputs
    by_key = {key: [o.get(key) for o in outputs] for key in outputs[0]}
    if not all(isinstance(v, Tensor) and v.dim() == values[0].dim() for values in by_key.values() for v in values):
        return outputs
    return {key: torch.stack(_of_one_shape(values)) for key, values in by_key.items()}


def finite_outputs(module: nn.Module, few: FewImages, importance: Importance | None = None) -> list[Tensor]:
    """The outputs that count, 0 where they are not finite; none where the model does not run on few images."""
    try:
        outputs = run_batch(module, few.inputs, few.number)
    except GhostifyError:
        return []
    tensors = counted_tensors(outputs, importance)
    if any(o.isnan().any() for o in tensors):
        warn_user(
            f"calibration batch {few.number}: the model's outputs have NaN values. They do not count for the "
            "sensitivity of the outputs."
        )
    return [finite(o) for o in tensors]


def finite(output: Tensor) -> Tensor:
    """The output with 0 for values that are not finite."""
    return output if output.isfinite().all() else torch.where(output.isfinite(), output, 0)


def output_scale(module: nn.Module, batches: CalibrationBatches, importance: Importance | None = None) -> OutputScale:
    """The scale of the outputs of `module` in evaluation mode, from the first `DEVIATION_IMAGES` images."""
    with eval_mode(module):
        deviations = output_deviations(partial(finite_outputs, module, importance=importance), batches)
    return OutputScale(deviations, importance)


def output_deviations(run: Run, batches: CalibrationBatches) -> tuple[Tensor, ...]:
    """The deviation of each tensor of the outputs that `run` gives, from the first `DEVIATION_IMAGES` images.

    The squared deviation of a tensor is its variance over images, summed over its values. Where channels differ in
    scale, such as boxes in pixels and scores, each has its own, so that all channels count the same; channels whose
    deviations are within a factor of about `COMMON_SCALE_FACTOR` of each other share one, so that those that vary less
    count less. The channels are along the dimension along which deviations vary most. Of a channel's variance over
    images, no image gives more than all others together; a deviation is at least `MIN_RELATIVE_DEVIATION` times the
    channel's root mean square. Outputs that vary in shape, or of one image, are measured from 0.
    """
    pieces = partial(first_images, batches, DEVIATION_IMAGES)
    facts, sums, count = list[Tensor](), list[list[Tensor]](), torch.zeros(())
    for few in pieces():
        tensors = run(few)
        facts.append(_facts(tensors, count_images(few.inputs)))
        sums.append([few.weight * o.double().sum(0) if o.dim() else o.double() for o in tensors])
        count += few.weight * count_images(few.inputs)
    layouts, count = _layouts(facts), all_reduce_sum(count)[0]
    if not layouts:
        return ()
    means = [
        all_reduce_sum(torch.stack(of_pieces).sum(0))[0] / count
        if layout.has_fixed_shape and count > 1
        else torch.zeros((), dtype=torch.float64)
        for layout, of_pieces in zip(layouts, zip(*sums, strict=True), strict=True)
    ]
    outputs = zip(layouts, means, _energies(run, pieces(), layouts, means), strict=True)
    deviations = tuple(_deviation(*output, freedom=int(count) - 1) for output in outputs)
    return deviations if any(s.isfinite().any() for s in deviations) else ()


@dataclass(frozen=True)
class _Layout:
    """What an output tensor has in common on all images: whether its rows are images, the other dimensions that have
    one size (-1: the last), and whether its shape is the same for all images."""

    has_image_rows: bool
    dims: tuple[int, ...]
    has_fixed_shape: bool

    def sums(self, values: Tensor, dim: int) -> Tensor:
        """Sums by channel along `dim` (rows x channels), for 0 of all values together; a row is an image, or all."""
        rows = (values if self.has_image_rows else values[None])[..., None, None]
        kept = rows.dim() - 2 + dim
        return rows.sum([k for k in range(1, rows.dim()) if k != kept])


def _facts(outputs: Sequence[Tensor], images: int) -> Tensor:
    """The number of dimensions of each output, whether its rows are images, and its sizes from the last dimension on
    (outputs x facts)."""
    rows = [
        [o.dim(), bool(o.dim()) and len(o) == images, *(*reversed(o.shape), *[0] * MAX_DIMENSIONS)[:MAX_DIMENSIONS]]
        for o in outputs
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), MAX_DIMENSIONS + 2)


def _layouts(facts: Sequence[Tensor]) -> list[_Layout]:
    """The layout of each output tensor, from its facts; none where there are not as many tensors in each forward."""
    counts = all_gather_rows(torch.tensor([[float(len(of_piece))] for of_piece in facts]))
    if (counts != counts[0]).any() or not counts[0]:
        return []
    rows = all_gather_rows(torch.stack([of_piece.flatten() for of_piece in facts])).unflatten(
        1, (-1, facts[0].shape[1])
    )
    layouts = []
    for (rank, is_batch, *_), is_same in zip(rows[0].long().tolist(), (rows == rows[0]).all(0).tolist(), strict=True):
        has_image_rows = bool(is_batch) and is_same[1]
        inner = min(rank - has_image_rows, MAX_DIMENSIONS) if is_same[0] else 0
        dims = tuple(-k for k in range(1, inner + 1) if is_same[k + 1])
        layouts.append(_Layout(has_image_rows, dims, has_image_rows and len(dims) == rank - 1))
    return layouts


def _energies(
    run: Run, pieces: Iterable[FewImages], layouts: Sequence[_Layout], means: Sequence[Tensor]
) -> list[list[Tensor]]:
    """For each output and each of its dimensions, after one for all its values together: the squared distances from
    the mean, summed by channel (rows x channels, float64)."""
    energies: list[list[list[Tensor]]] = [[[] for _ in (0, *layout.dims)] for layout in layouts]
    for few in pieces:
        for layout, mean, of_output, output in zip(layouts, means, energies, run(few), strict=True):
            squares = few.weight * (output.double() - mean.to(output.device)).square()
            for rows, dim in zip(of_output, (0, *layout.dims), strict=True):
                rows.append(layout.sums(squares, dim).cpu())
    return [[all_gather_rows(torch.cat(rows)).double() for rows in of_output] for of_output in energies]


def _deviation(layout: _Layout, mean: Tensor, energies: Sequence[Tensor], freedom: int) -> Tensor:
    """The deviation of an output, by channel along the dimension along which deviations vary most."""
    has_mean = layout.has_fixed_shape and freedom > 0
    best, best_spread = torch.full((1,), math.inf), -1.0
    for rows, dim in zip(energies, (0, *layout.dims), strict=True):
        powers = layout.sums(mean.square()[None], dim)[0].cpu() if has_mean else 0
        variances = _without_outlier(rows, freedom if has_mean else 0) / (freedom + 1)
        variances = variances.maximum(MIN_RELATIVE_DEVIATION**2 * (variances + powers))
        if not variances.any():
            return best
        variances = torch.where(variances > 0, variances, variances[variances > 0].median())
        spread = float(variances.log().std(correction=0))
        if spread > best_spread:
            best, best_spread = _shared_scale(variances, freedom).unflatten(0, (-1, *[1] * (-1 - dim))), spread
    return best.float()


def _without_outlier(energies: Tensor, freedom: int) -> Tensor:
    """The sum over rows, of which no row gives more than all others together, where there are more than two.

    With `freedom` they are squared distances from the rows' mean: the others' distances are then from their own mean.
    """
    total = energies.sum(0)
    if len(energies) < MIN_ROWS:
        return total
    largest = energies.amax(0)
    without = (total - largest * (1 + 1 / freedom if freedom else 1)).clamp_min(0)
    return without + without.minimum(total - without)


def _shared_scale(variances: Tensor, freedom: int) -> Tensor:
    """Deviations of channels from their variances (n): those of similar channels are averaged.

    One step of mean shift on the logarithms (Cheng 1995), with a wider kernel where few degrees of freedom make them
    noisy. Variances relative to the squared deviations add up to 1.
    """
    logs = variances.log() / 2
    width = math.sqrt(math.log(COMMON_SCALE_FACTOR) ** 2 + 0.5 / freedom) if freedom else math.inf
    means = []
    for some in logs.split(CHANNELS_AT_A_TIME):
        weights = torch.exp(-((some[:, None] - logs) / width).square() / 2)
        means.append(weights @ logs / weights.sum(1))
    squares = (2 * torch.cat(means)).exp()
    return (squares * (variances / squares).sum()).sqrt()


def _difference(expected: Tensor, actual: Tensor) -> Tensor:
    """`actual` - `expected` where `expected` is finite; rows that one of them lacks are 0 there."""
    expected, actual = _of_one_shape([expected, actual])
    return torch.where(expected.isfinite(), actual - expected, 0)


def _of_one_shape(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of equally many dimensions, filled up with 0 to the largest sizes."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    missing = [[size - present for size, present in zip(shape, t.shape, strict=True)] for t in tensors]
    pads = [[pad for size in reversed(sizes) for pad in (0, size)] for sizes in missing]
    return [F.pad(t, pad) if any(pad) else t for t, pad in zip(tensors, pads, strict=True)]
