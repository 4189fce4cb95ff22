"""Greedy choice of the input channels of a linear consumer that predict the others best; tensor maths only.

Maps x (n) with covariance C are read by filters W, and errors of the filters' outputs are weighted by a metric G. So
pruning maps costs tr(M R), where M = W' G W, and R is the residual of C when the kept maps predict the others. The
filters of the consumer absorb these predictions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ghostify.fitting.linear_solvers import damping_for, solve_damped

MIN_RELATIVE_VARIANCE = 1e-10


def greedy_order(covariances: Sequence[Tensor], importances: Sequence[Tensor]) -> list[int]:
    """The maps (n) in the order of selection: each reduces tr(M R) the most, given those before it; ties by index.

    With several consumers, each with its own covariance C and importance M, tr(M R) is summed over them.
    """
    reductions = [_Reduction(c, m) for c, m in zip(covariances, importances, strict=True)]
    ranking: list[int] = []
    free = torch.ones(len(covariances[0]), dtype=torch.bool)
    while len(ranking) < len(free):
        gains = [reduction.gains() for reduction in reductions]
        gain = torch.where(free, torch.stack(gains).sum(0), -1.0)
        pick = int(gain.argmax())
        if gain[pick] <= 0:
            break
        for reduction in reductions:
            reduction.keep(pick)
        free[pick] = False
        ranking.append(pick)
    return ranking + free.nonzero().flatten().tolist()


class _Reduction:
    """The residual R of one consumer's covariance, given the maps kept so far, and B = R M R.

    Each kept map eliminates its column of R (one pivot) and updates B by a matrix of rank two: n^3 operations overall.
    """

    def __init__(self, covariance: Tensor, importance: Tensor) -> None:
        self.residual, self.weighted = covariance.clone(), covariance @ importance @ covariance
        self.floor = MIN_RELATIVE_VARIANCE * covariance.diagonal().mean().clamp_min(torch.finfo(covariance.dtype).tiny)

    def gains(self) -> Tensor:
        """The reduction of tr(M R) by each map (n), 0 where the kept maps predict it."""
        variance = self.residual.diagonal()
        return torch.where(variance > self.floor, self.weighted.diagonal() / variance.clamp_min(self.floor), 0.0)

    def keep(self, pick: int) -> None:
        """Keep one more map."""
        residual, weighted = self.residual, self.weighted
        if residual[pick, pick] <= self.floor:
            return
        column, weighted_column = residual[:, pick].clone(), weighted[:, pick].clone()
        pivot = float(residual[pick, pick])
        mixed = torch.outer(column, weighted_column) / pivot
        weighted += torch.outer(column, column) * (float(weighted[pick, pick]) / pivot**2) - mixed - mixed.T
        residual -= torch.outer(column, column) / pivot


def selection_error(kept: Sequence[int], fitted: Tensor, holdout: Tensor, importance: Tensor, rows: float) -> float:
    """tr(M R) on the covariance `holdout`, with predictions by the `kept` maps that are fitted on `fitted`.

    The covariances are n x n; `rows` is the number of rows of `fitted`.
    """
    index = torch.tensor(kept)
    kept_covariance = fitted[index][:, index]
    predictors = solve_damped(kept_covariance, fitted[index], damping_for(kept_covariance, rows))
    cross = holdout[:, index] @ predictors
    residual = holdout - cross - cross.T + predictors.T @ holdout[index][:, index] @ predictors
    return float((importance * residual).sum().clamp_min(0))
