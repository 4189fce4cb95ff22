"""Predictions of a model, their top-1 accuracy, and their relative error against a reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.errors import GhostifyError
from ghostify.graph.modes import eval_mode
from ghostify.numerics import relative_squared_error
from ghostify.text import first_line


def predict(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """The outputs of a model on all batches (N x classes), in evaluation mode.

    Raises `GhostifyError` where the model does not run on a batch.
    """
    with eval_mode(model):
        outputs = [run_on_images(model, batch, number) for number, batch in enumerate(batches)]
    try:
        return torch.cat(outputs)
    except RuntimeError as error:
        raise GhostifyError(
            f"images: the outputs of their batches differ in shape ({first_line(error)}). Pass images of one size."
        ) from error


def run_on_images(model: nn.Module, batch: Tensor, number: int = 0) -> Any:
    """The output of a model on one batch; raises `GhostifyError` where it does not run."""
    try:
        return model(batch)
    except Exception as error:
        raise GhostifyError(
            f"images: {type(model).__name__} does not run on batch {number} ({type(error).__name__}: "
            f"{first_line(error)}). Pass images as the model takes them."
        ) from error


def top1(outputs: Tensor, labels: Tensor) -> float:
    """Percentage of predictions (N x classes) whose largest value is at the label (N)."""
    return 100 * (outputs.argmax(1) == labels).float().mean().item()


def relative_error(outputs: Tensor, reference: Tensor) -> float:
    """||y^ - y||^2 / ||y - mean(y)||^2 over all outputs, the mean taken per output over the images."""
    return float(relative_squared_error(outputs, reference))
