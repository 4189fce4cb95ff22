"""Which maps a linear consumer can do without: greedy subsets by the error that is left; tensor maths only.

Maps x (n) with covariance C are read by filters W; errors of what the filters make count by a metric G, so that leaving
maps out costs tr(M R): M = W' G W, and R what is left of C when the maps that are kept predict the others. A map that
the others predict is a ghost that the filters of the consumer take up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ghostify.fitting.linear_solvers import damping_for, solve_damped

SPENT = 1e-10


def greedy_order(covariances: Sequence[Tensor], importances: Sequence[Tensor]) -> list[int]:
    """The maps (n), each the one that takes most from tr(M R) once those before it are kept; ties by number.

    Where several consumers read the maps, each with a covariance and an importance of its own, from the sum over them.
    """
    reductions = [_Reduction(*both) for both in zip(covariances, importances, strict=True)]
    taken: list[int] = []
    free = torch.ones(len(covariances[0]), dtype=torch.bool)
    while len(taken) < len(free):
        gains = [reduction.gains() for reduction in reductions]
        gain = torch.where(free, torch.stack(gains).sum(0), -1.0)
        pick = int(gain.argmax())
        if gain[pick] <= 0:
            break
        for reduction in reductions:
            reduction.keep(pick)
        free[pick] = False
        taken.append(pick)
    return taken + free.nonzero().flatten().tolist()


class _Reduction:
    """What is left for one consumer once some maps are kept.

    One pivot takes the k-th column of R away, and B = R M R follows by updates of rank two: n^3 operations in all.
    """

    def __init__(self, covariance: Tensor, importance: Tensor) -> None:
        self.rest, self.both = covariance.clone(), covariance @ importance @ covariance
        self.floor = SPENT * covariance.diagonal().mean().clamp_min(torch.finfo(covariance.dtype).tiny)

    def gains(self) -> Tensor:
        """What each map would take from tr(M R), nothing where the others predict it."""
        own = self.rest.diagonal()
        return torch.where(own > self.floor, self.both.diagonal() / own.clamp_min(self.floor), 0.0)

    def keep(self, pick: int) -> None:
        """Keep one more map."""
        rest, both = self.rest, self.both
        if rest[pick, pick] <= self.floor:
            return
        column, seen, pivot = rest[:, pick].clone(), both[:, pick].clone(), float(rest[pick, pick])
        mixed = torch.outer(column, seen) / pivot
        both += torch.outer(column, column) * (float(both[pick, pick]) / pivot**2) - mixed - mixed.T
        rest -= torch.outer(column, column) / pivot


def selection_error(kept: Sequence[int], fitted: Tensor, judged: Tensor, importance: Tensor, rows: float) -> float:
    """tr(M R) with predictions of the other maps by `kept` made on one covariance, from `rows`, judged on another."""
    index = torch.tensor(kept)
    own = fitted[index][:, index]
    taken_up = solve_damped(own, fitted[index], damping_for(own, rows))
    cross = judged[:, index] @ taken_up
    left = judged - cross - cross.T + taken_up.T @ judged[index][:, index] @ taken_up
    return float((importance * left).sum().clamp_min(0))
