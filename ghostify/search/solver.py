"""One candidate of each list, within limits, with the least loss: a mixed-integer program."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, lil_array

from ghostify.errors import GhostifyError
from ghostify.search.candidates import Candidate

SECONDS = 60
OUT_OF_TIME = 1  # scipy's status


@dataclass(frozen=True)
class GroupConstraint:
    """A convolution, of the list number `conv`, `makes` or `reads` as many maps as the link of list `group` keeps."""

    conv: int
    group: int
    key: str


def choose_candidates(
    choices: Sequence[Sequence[Candidate]], limits: list[float], ties: Sequence[GroupConstraint] = ()
) -> list[int] | None:
    """One candidate of each list, with the least sum of losses among those whose costs keep within `limits`, or None.

    Lists that are tied agree on their maps. A mixed-integer program, to a relative gap of 1e-4. Raises `GhostifyError`
    where time ends before anything is found.
    """
    if not choices:
        return [] if all(limit >= 0 for limit in limits) else None
    flat = [c for options in choices for c in options]
    sizes = [len(options) for options in choices]
    owner = np.repeat(np.arange(len(choices)), sizes)
    one_each = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))))
    starts = np.cumsum([0, *sizes])
    spent = np.array([c.costs for c in flat], dtype=float).T
    scale = spent.max(axis=1, initial=1)
    within = LinearConstraint(spent / scale[:, None], -np.inf, np.array(limits) / scale)
    agreeing = [LinearConstraint(_agreement(choices, starts, tie), 0, 0) for tie in ties]
    losses = np.array([c.loss for c in flat])
    with _silence_stdout():
        result = milp(
            losses / max(losses.max(), 1e-300),
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), within, *agreeing],
            options={"mip_rel_gap": 1e-4, "time_limit": SECONDS},
        )
    if result.x is None:
        if result.status != OUT_OF_TIME:
            return None
        raise GhostifyError(
            f"no plan was found in {SECONDS} s ({result.message}): target fewer layers, or relax a budget"
        )
    return [int(result.x[a:b].argmax()) for a, b in pairwise(starts)]


def _agreement(choices: Sequence[Sequence[Candidate]], starts: Any, tie: GroupConstraint) -> csr_array:
    """For each number of maps that the link may keep: candidates of the convolution with so many, less the link's."""
    kept = [None if c.kept is None else len(c.kept) for c in choices[tie.group]]
    rows = {count: row for row, count in enumerate(kept[1:])}
    sides = ((tie.conv, [getattr(c, tie.key) for c in choices[tie.conv]], 1.0), (tie.group, kept, -1.0))
    matrix = lil_array((len(rows), starts[-1]))
    for number, counts, sign in sides:
        for column, count in enumerate(counts, starts[number]):
            if count is not None:
                matrix[rows[count], column] = sign
    return matrix.tocsr()


@contextmanager
def _silence_stdout() -> Iterator[None]:
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
