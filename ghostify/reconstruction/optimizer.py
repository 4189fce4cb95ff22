"""A bounded number of gradient steps on some tensors; tensor maths only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def adam_steps(
    loss: Callable[[], Tensor], learning_rates: list[tuple[Tensor, float]], rate_factor: Callable[[int], float | None]
) -> Iterator[int]:
    """Adam on float32 copies of tensors with learning rates, which `rate_factor` multiplies for each step.

    Yields the number of each step after it; stops where the factor is None or `loss` has no gradient.
    """
    parameters = [p for p, _ in learning_rates]
    masters = [p.detach().float().clone() for p in parameters]
    optimizer = torch.optim.Adam(
        [{"params": [m], "lr": rate} for m, (_, rate) in zip(masters, learning_rates, strict=True)], betas=(0.9, 0.99)
    )
    for step in itertools.count():
        factor = rate_factor(step)
        if factor is None:
            return
        for group, (_, rate) in zip(optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = factor * rate
        gradients = _gradients(loss, parameters)
        if gradients is None:
            return
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.float()
        optimizer.step()
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.copy_(master)
        yield step + 1


def cosine_schedule(steps: int) -> Callable[[int], float | None]:
    """The factor for each of so many steps: from 1 towards 0 along a cosine (Loshchilov and Hutter, 2017)."""
    return lambda step: cosine_factor(step / steps) if step < steps else None


def cosine_factor(share: float) -> float:
    """The factor of learning rates after a share of all steps."""
    return (1 + math.cos(math.pi * share)) / 2


def _gradients(loss: Callable[[], Tensor], parameters: list[Tensor]) -> tuple[Tensor | None, ...] | None:
    """None where the loss has no gradient, or the model overwrites values that the gradient needs."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            value = loss()
            return torch.autograd.grad(value, parameters, allow_unused=True) if value.requires_grad else None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
