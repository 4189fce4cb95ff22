"""Latencies of several models, timed alternately so that changes of the machine's speed affect all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ghostify.graph.inputs import bind_example, call_model
from ghostify.graph.modes import eval_mode

WARMUP_ROUNDS, MIN_TURN_MS = 2, 1.0


def interleaved_latency_ms(models: Sequence[nn.Module], examples: Sequence[Any], *, rounds: int = 15) -> list[float]:
    """Median latency (ms) of one forward of each model on its example, in evaluation mode."""
    forwards = [partial(call_model, m, bind_example(m, x)) for m, x in zip(models, examples, strict=True)]
    with eval_mode(*models):
        return [statistics.median(latencies_ms) for latencies_ms in time_interleaved(forwards, rounds)]


def time_interleaved(forwards: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Latencies (ms) of each forward, one for each round.

    In a round, each forward is repeated until its turn takes about `MIN_TURN_MS`; the first `WARMUP_ROUNDS` rounds
    determine the number of repeats and are not returned.
    """
    latencies_ms: list[list[float]] = [[] for _ in forwards]
    repeats = [1] * len(forwards)
    for turn in range(WARMUP_ROUNDS + rounds):
        for k, forward in enumerate(forwards):
            started = time.perf_counter()
            for _ in range(repeats[k]):
                forward()
            _synchronize()
            latency_ms = 1000 * (time.perf_counter() - started) / repeats[k]
            if turn < WARMUP_ROUNDS:
                repeats[k] = max(1, round(MIN_TURN_MS / max(latency_ms, 1e-3)))
            else:
                latencies_ms[k].append(latency_ms)
    return latencies_ms


def _synchronize() -> None:
    """Wait until the GPU, if any, has finished."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
