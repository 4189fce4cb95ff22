"""One candidate of each list, within limits, with the least loss: a mixed-integer program."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from ghostify.budgeting.candidates import Candidate


def solve(
    choices: Sequence[Sequence[Candidate]], limits: list[float], apart: Sequence[tuple[int, int]] = ()
) -> list[int] | None:
    """One candidate of each list, with the least sum of losses among those whose costs keep within `limits`, or None.

    Of two lists that are `apart`, one candidate at least is the first. A mixed-integer program, to a relative gap of
    1e-4.
    """
    if not choices:
        return [] if all(limit >= 0 for limit in limits) else None
    flat = [c for options in choices for c in options]
    owner = np.repeat(np.arange(len(choices)), [len(options) for options in choices])
    one_each = LinearConstraint((owner == np.arange(len(choices))[:, None]).astype(float), 1, 1)
    starts = np.cumsum([0, *(len(options) for options in choices)])
    first = np.zeros((len(apart), len(flat)))
    for row, pair in zip(first, apart, strict=True):
        row[starts[list(pair)]] = 1
    spent = np.array([c.costs for c in flat], dtype=float).T
    scale = spent.max(axis=1, initial=1)
    within = LinearConstraint(spent / scale[:, None], -np.inf, np.array(limits) / scale)
    losses = np.array([c.loss for c in flat])
    with _mute():
        result = milp(
            losses / max(losses.max(), 1e-300),
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[one_each, within, *([LinearConstraint(first, 1, np.inf)] if apart else [])],
            options={"mip_rel_gap": 1e-4, "time_limit": 60},
        )
    if result.x is None:
        return None
    return [int(result.x[a:b].argmax()) for a, b in pairwise(starts)]


@contextmanager
def _mute() -> Iterator[None]:
    """Keep standard output clean of what the solver's library writes there past Python, whatever its options say."""
    sys.stdout.flush()
    standing, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(standing, 1)
        os.close(standing)
        os.close(nowhere)
