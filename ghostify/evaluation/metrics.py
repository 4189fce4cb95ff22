"""How well a model answers: top-1 where there are labels, agreement with the original where there is one, and speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.graph.inputs import bind_example, call_model
from ghostify.graph.modes import eval_mode
from ghostify.numerics import relative_squared_error

WARMUP_ROUNDS, MIN_TURN_MS = 2, 1.0


def predict(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """The outputs of a model on all batches (N x classes), in evaluation mode."""
    with eval_mode(model):
        return torch.cat([model(batch) for batch in batches])


def top1(outputs: Tensor, labels: Tensor) -> float:
    """Percentage of images whose largest output (N x classes) is that of the label (N)."""
    return 100 * (outputs.argmax(1) == labels).float().mean().item()


def relative_error(outputs: Tensor, reference: Tensor) -> float:
    """||y^ - y||^2 / ||y - mean(y)||^2 over all outputs, the mean taken per output over the images."""
    return float(relative_squared_error(outputs, reference))


def interleaved_latency_ms(models: Sequence[nn.Module], examples: Sequence[Any], *, rounds: int = 15) -> list[float]:
    """Median milliseconds of one forward of each model on its example, in turn: they share the machine's moods."""
    forwards = [partial(call_model, m, bind_example(m, x)) for m, x in zip(models, examples, strict=True)]
    with eval_mode(*models):
        return [statistics.median(own) for own in time_interleaved(forwards, rounds)]


def time_interleaved(forwards: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Milliseconds of each, turn by turn; a turn has as many forwards as the clock needs."""
    times: list[list[float]] = [[] for _ in forwards]
    repeats = [1] * len(forwards)
    for turn in range(WARMUP_ROUNDS + rounds):
        for k, forward in enumerate(forwards):
            started = time.perf_counter()
            for _ in range(repeats[k]):
                forward()
            _finish()
            spent = 1000 * (time.perf_counter() - started) / repeats[k]
            if turn < WARMUP_ROUNDS:
                repeats[k] = max(1, round(MIN_TURN_MS / max(spent, 1e-3)))
            else:
                times[k].append(spent)
    return times


def _finish() -> None:
    """Wait for what a GPU has been given to do."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
