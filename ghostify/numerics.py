"""Relative errors, tolerance checks and derived seeds; tensors only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_VARIANCE = 1e-30
MIN_SHARE_OF_POWER = 1e-6  # a smaller variance may be rounding of float32 values, or of their squares
MIN_SHARE_OF_VARIANCES = 1e-10
MIN_SHARE_OF_COSTS = 0.05
SEED_STRIDE = 1_000_003
RUNNING_STATISTICS = ("running_mean", "running_var")


def relative_to_variance(squared_error: Tensor, variance: Tensor, minimum: float = MIN_VARIANCE) -> Tensor:
    """A squared error relative to a variance, which is at least `minimum`; both are means or both are sums."""
    return squared_error / variance.clamp_min(minimum)


def error_scales(variance: Tensor, mean_square: Tensor, weights: Tensor) -> Tensor:
    """What squared errors of a layer's channels (n) are relative to: their variances, bounded from below.

    The variance of a channel that always has nearly the same value is rounding error. It counts as a small share of the
    channel's mean square, or of the mean variance of the channels if that is larger. `weights` (n) are the costs of
    squared errors: a channel whose variance costs far less than the others' counts as if it cost
    `MIN_SHARE_OF_COSTS` of their mean, so that its errors do not rule a mean over channels.
    """
    rounding = torch.maximum(MIN_SHARE_OF_POWER * mean_square, MIN_SHARE_OF_VARIANCES * variance.mean())
    negligible = MIN_SHARE_OF_COSTS * (weights * variance).mean() / weights
    return torch.maximum(variance, torch.maximum(rounding, negligible)).clamp_min(MIN_VARIANCE)


def relative_squared_error(
    estimate: Tensor,
    reference: Tensor,
    *,
    over: Sequence[int] = (0,),
    ignore_mean: bool = False,
    per_map: bool = False,
    minimum: float = MIN_VARIANCE,
) -> Tensor:
    """||x - y||^2 / ||y - mean(y)||^2 for an estimate x of a reference y, the mean taken over the dimensions `over`.

    A scalar, or with `per_map` one value for each index of the other dimensions. With `ignore_mean` the mean of x is
    subtracted from x as well, so that a constant offset does not count. `minimum` bounds the denominator from below.
    """
    dims = list(over)
    centred = reference - reference.mean(dims, keepdim=True)
    error = (estimate - estimate.mean(dims, keepdim=True)) - centred if ignore_mean else estimate - reference
    squared_error, variance = (v.square().sum(dims if per_map else None) for v in (error, centred))
    return relative_to_variance(squared_error, variance, minimum)


@dataclass(frozen=True)
class Mismatch:
    """The largest absolute difference between two tensors, and the largest absolute value of the reference."""

    difference: float
    largest: float


def find_mismatch(
    output: Tensor, reference: Tensor, *, of_largest: float = 0.0, of_each: float = 0.0
) -> Mismatch | None:
    """None where |y - r| <= of_largest max|r| + of_each (1 + |r|) at every element, else how far y is from r.

    NaN equals NaN, and an infinity equals itself. Tensors of different shapes differ by infinity.
    """
    expected = reference.detach().double()
    finite = expected[expected.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    if output.shape != reference.shape:
        return Mismatch(float("inf"), largest)
    actual = output.detach().double()
    close = torch.isclose(actual, expected, rtol=of_each, atol=of_each + of_largest * largest, equal_nan=True)
    if close.all():
        return None
    return Mismatch((actual - expected)[~close].abs().nan_to_num(nan=float("inf")).max().item(), largest)


def outputs_match(outputs: Sequence[Tensor], reference: Sequence[Tensor], tolerance: float) -> bool:
    """Whether both have the same number of tensors, with |y - r| <= tolerance (1 + |r|) at every element."""
    if len(outputs) != len(reference):
        return False
    return all(find_mismatch(y, r, of_each=tolerance) is None for y, r in zip(outputs, reference, strict=True))


def derive_seed(seed: int, number: int) -> int:
    """The seed of step or image `number`, `SEED_STRIDE` away from that of the next user seed; from 0 to 2^64 - 1."""
    return (seed * SEED_STRIDE + number) % 2**64


def first_not_finite(tensors: Mapping[str, Tensor], parameters: Set[str]) -> str | None:
    """The name of the first tensor with NaN, or with infinity if it is a parameter or a running statistic.

    Other tensors may hold infinities, as masks do. None if there is no such tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            values = tensor.float() if tensor.element_size() == 1 else tensor
            is_weight = name in parameters or name.endswith(RUNNING_STATISTICS)
            if not bool((values.isfinite() if is_weight else ~values.isnan()).all()):
                return name
    return None
