"""Which maps a linear consumer can do without: greedy subsets by the error that is left; tensor maths only.

Maps x (n) with covariance C are read by filters W; errors of what the filters make count by a metric G, so that leaving
maps out costs tr(M R): M = W' G W, and R what is left of C when the maps that are kept predict the others. A map that
the others predict is a ghost that the filters of the consumer take up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ghostify.fitting.systems import damping_for, solve_damped

SPENT = 1e-10


def greedy_order(covariance: Tensor, importance: Tensor) -> list[int]:
    """The maps (n), each the one that takes most from tr(M R) once those before it are kept; ties by number.

    One pivot takes the k-th column of R away, and B = R M R follows by updates of rank two: n^3 operations in all.
    """
    rest, both = covariance.clone(), covariance @ importance @ covariance
    floor = SPENT * covariance.diagonal().mean().clamp_min(torch.finfo(covariance.dtype).tiny)
    taken: list[int] = []
    free = torch.ones(len(rest), dtype=torch.bool)
    while len(taken) < len(rest):
        own = rest.diagonal()
        gain = torch.where(free & (own > floor), both.diagonal() / own.clamp_min(floor), -1.0)
        pick = int(gain.argmax())
        if gain[pick] <= 0:
            break
        column, seen, pivot = rest[:, pick].clone(), both[:, pick].clone(), float(rest[pick, pick])
        mixed = torch.outer(column, seen) / pivot
        both += torch.outer(column, column) * (float(both[pick, pick]) / pivot**2) - mixed - mixed.T
        rest -= torch.outer(column, column) / pivot
        free[pick] = False
        taken.append(pick)
    return taken + free.nonzero().flatten().tolist()


def loss_of(kept: Sequence[int], fitted: Tensor, judged: Tensor, importance: Tensor, rows: float) -> float:
    """tr(M R) with predictions of the other maps by `kept` made on one covariance, from `rows`, judged on another."""
    index = torch.tensor(kept)
    own = fitted[index][:, index]
    taken_up = solve_damped(own, fitted[index], damping_for(own, rows))
    cross = judged[:, index] @ taken_up
    left = judged - cross - cross.T + taken_up.T @ judged[index][:, index] @ taken_up
    return float((importance * left).sum().clamp_min(0))
