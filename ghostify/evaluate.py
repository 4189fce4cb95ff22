"""How well a model answers: top-1 where there are labels, agreement with the original where there is one, and speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ghostify.modes import evaluating


def outputs(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """The model's outputs on all batches (N x classes), in evaluation mode."""
    with evaluating(model):
        return torch.cat([model(batch) for batch in batches])


def top1(answers: Tensor, labels: Tensor) -> float:
    """Percent of right answers."""
    return 100 * (answers.argmax(1) == labels).float().mean().item()


def relative_error(answers: Tensor, reference: Tensor) -> float:
    """||y^ - y||^2 / ||y - mean(y)||^2 over all outputs, the mean taken per output over the images."""
    spread = (reference - reference.mean(0)).square().sum().clamp_min(1e-30)
    return float((answers - reference).square().sum() / spread)


def paired_milliseconds(models: Sequence[nn.Module], inputs: Tensor, *, rounds: int = 15) -> list[float]:
    """Median milliseconds of one forward of each model, run in turn so that they share the machine's moods."""
    times: list[list[float]] = [[] for _ in models]
    with evaluating(*models):
        for round_ in range(rounds + 2):
            for model, own in zip(models, times, strict=True):
                started = time.perf_counter()
                model(inputs)
                if round_ >= 2:
                    own.append(1000 * (time.perf_counter() - started))
    return [statistics.median(own) for own in times]
