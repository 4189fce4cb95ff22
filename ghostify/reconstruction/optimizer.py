"""A bounded number of gradient steps on some tensors; tensor maths only."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def adam_steps(loss: Callable[[], Tensor], learning_rates: list[tuple[Tensor, float]], steps: int) -> Iterator[int]:
    """Adam with cosine schedule on float32 copies of tensors with learning rates.

    Yields the number of each step after it; stops where `loss` has no gradient.
    """
    parameters = [p for p, _ in learning_rates]
    masters = [p.detach().float().clone() for p in parameters]
    optimizer = torch.optim.Adam(
        [{"params": [m], "lr": rate} for m, (_, rate) in zip(masters, learning_rates, strict=True)], betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        gradients = _gradients(loss, parameters)
        if gradients is None:
            return
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.float()
        optimizer.step()
        schedule.step()
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.copy_(master)
        yield step + 1


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
