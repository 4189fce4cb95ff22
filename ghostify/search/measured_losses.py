"""Losses of candidates measured by simulation, and the predicted losses of the other candidates corrected by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ghostify.search.candidates import Candidate
from ghostify.search.model_changes import ModelChange
from ghostify.search.simulation import Simulator

MIN_LOSS = 1e-7

Key = tuple[int, int]  # the number of a list, and of a candidate in it


@dataclass(frozen=True, eq=False)
class MeasuredLosses:
    """The losses of candidates that `simulator` has measured so far, by list and candidate."""

    simulator: Simulator
    losses: dict[Key, float] = field(default_factory=dict)

    def measure(self, changes: Mapping[Key, ModelChange]) -> int:
        """Measure those of the changes that have no measurement yet; returns their number."""
        missing = {key: change for key, change in changes.items() if change and key not in self.losses}
        comparisons = self.simulator.compare(list(missing.values()))
        for key, comparison in zip(missing, comparisons, strict=True):
            self.losses[key] = math.nan if comparison is None else comparison.error
        return len(missing)

    def corrected(self, candidates: Sequence[Sequence[Candidate]]) -> list[list[Candidate]]:
        """The candidates with measured losses, or predicted ones corrected by those of their list."""
        corrected = []
        for number, alternatives in enumerate(candidates):
            measured = {
                k: self.losses[number, k]
                for k in range(len(alternatives))
                if not math.isnan(self.losses.get((number, k), math.nan))
            }
            losses = corrected_losses([c.loss for c in alternatives], measured)
            corrected.append([replace(c, loss=loss) for c, loss in zip(alternatives, losses, strict=True)])
        return corrected


def corrected_losses(predicted: Sequence[float], measured: Mapping[int, float]) -> list[float]:
    """The measured losses of those with these numbers; the others are predicted losses times a factor.

    The logarithm of the factor, measured / predicted, is interpolated over that of the predicted loss, and is constant
    beyond the measured ones. Losses below `MIN_LOSS` count as that; a predicted loss of 0 stays.
    """
    if not measured:
        return list(predicted)
    logs = np.log([max(predicted[k], MIN_LOSS) for k in measured])
    factors = np.log([max(loss, MIN_LOSS) for loss in measured.values()]) - logs
    points, first = np.unique(logs, return_inverse=True)
    means = np.bincount(first, weights=factors) / np.bincount(first)
    corrected = []
    for k, loss in enumerate(predicted):
        if k in measured:
            corrected.append(measured[k])
        elif not loss or not math.isfinite(loss):
            corrected.append(loss)
        else:
            log = math.log(max(loss, MIN_LOSS))
            corrected.append(math.exp(log + float(np.interp(log, points, means))))
    return corrected
