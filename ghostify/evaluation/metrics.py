"""Predictions of a model, their top-1 accuracy, and their relative error against a reference."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ghostify.graph.modes import eval_mode
from ghostify.numerics import relative_squared_error


def predict(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """The outputs of a model on all batches (N x classes), in evaluation mode."""
    with eval_mode(model):
        return torch.cat([model(batch) for batch in batches])


def top1(outputs: Tensor, labels: Tensor) -> float:
    """Percentage of predictions (N x classes) whose largest value is at the label (N)."""
    return 100 * (outputs.argmax(1) == labels).float().mean().item()


def relative_error(outputs: Tensor, reference: Tensor) -> float:
    """||y^ - y||^2 / ||y - mean(y)||^2 over all outputs, the mean taken per output over the images."""
    return float(relative_squared_error(outputs, reference))
