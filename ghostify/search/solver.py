"""The choice of one candidate of each list within limits that has the least loss: a mixed-integer program."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, lil_array

from ghostify.errors import GhostifyError
from ghostify.search.candidates import Candidate

SECONDS = 60
GAP = 1e-4
TIMED_OUT = 1  # scipy's status


@dataclass(frozen=True)
class GroupConstraint:
    """The `key` ("kept_out_count" or "kept_in_count") of the candidate of list `conv` is `others`, plus `per_channel`
    for each channel that the candidate of list `group` keeps."""

    conv: int
    group: int
    key: str
    per_channel: int = 1
    others: int = 0


@dataclass(frozen=True)
class GroupRange:
    """The channels of the group of list `group`, of which there are `size`, as `per_channel` channels each of a
    convolution."""

    group: int
    per_channel: int
    size: int


@dataclass(frozen=True)
class SumConstraint:
    """The `key` of the candidate of list `conv` is at least the number of channels that remain of `total` when each
    group keeps those of its candidate: the convolution's cost is an upper bound."""

    conv: int
    key: str
    total: int
    ranges: tuple[GroupRange, ...]


Constraint = GroupConstraint | SumConstraint


def choose_candidates(
    candidates: Sequence[Sequence[Candidate]],
    limits: Sequence[float],
    constraints: Sequence[Constraint] = (),
    gap: float = GAP,
) -> list[int] | None:
    """The index in each list of the candidates of least total loss whose total costs keep within `limits`, or None.

    A mixed-integer program, solved to a relative `gap`. Candidates whose loss or costs are not finite are not
    chosen. Raises `GhostifyError` where no solution is found within
    `SECONDS`.
    """
    if not candidates:
        return [] if all(limit >= 0 for limit in limits) else None
    flat = [candidate for alternatives in candidates for candidate in alternatives]
    sizes = [len(alternatives) for alternatives in candidates]
    list_of_column = np.repeat(np.arange(len(candidates)), sizes)
    one_each = csr_array((np.ones(len(flat)), (list_of_column, np.arange(len(flat)))))
    starts = np.cumsum([0, *sizes])
    losses, costs = np.array([c.loss for c in flat]), np.array([c.costs for c in flat], dtype=float).T
    is_known = np.isfinite(losses) & np.isfinite(costs).all(0)
    losses, costs = np.where(is_known, losses, 0), np.where(is_known, costs, 0)
    scale = costs.max(axis=1, initial=1)
    within = LinearConstraint(costs / scale[:, None], -np.inf, np.array(limits) / scale)
    agreements = [
        LinearConstraint(_agreement(candidates, starts, c), 0, 0)
        if isinstance(c, GroupConstraint)
        else LinearConstraint(_pruned_sum(candidates, starts, c), 0, np.inf)
        for c in constraints
    ]
    with _silence_stdout():
        result = milp(
            losses / max(losses.max(), 1e-300),
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, is_known.astype(float)),
            constraints=[LinearConstraint(one_each, 1, 1), within, *agreements],
            options={"mip_rel_gap": gap, "time_limit": SECONDS},
        )
    if result.x is None:
        if result.status != TIMED_OUT:
            return None
        raise GhostifyError(
            f"budget: no plan found in {SECONDS} s ({result.message}). Target fewer layers, or raise the limit."
        )
    return [int(result.x[start:stop].argmax()) for start, stop in pairwise(starts)]


def _agreement(
    candidates: Sequence[Sequence[Candidate]], starts: npt.NDArray[np.int64], constraint: GroupConstraint
) -> csr_array:
    """A row for each number of channels that the group may keep: 1 for the convolution's candidates with that number,
    -1 for the group's candidate."""
    kept_counts = [
        None if c.kept is None else constraint.others + constraint.per_channel * len(c.kept)
        for c in candidates[constraint.group]
    ]
    rows = {count: row for row, count in enumerate(kept_counts[1:])}
    conv_counts = [getattr(c, constraint.key) for c in candidates[constraint.conv]]
    matrix = lil_array((len(rows), starts[-1]))
    for number, counts, sign in ((constraint.conv, conv_counts, 1.0), (constraint.group, kept_counts, -1.0)):
        for column, count in enumerate(counts, starts[number]):
            if count is not None:
                matrix[rows[count], column] = sign
    return matrix.tocsr()


def _pruned_sum(
    candidates: Sequence[Sequence[Candidate]], starts: npt.NDArray[np.int64], constraint: SumConstraint
) -> csr_array:
    """One row: the channels that the groups' candidates prune, less those that the convolution's candidate lacks."""
    row = lil_array((1, starts[-1]))
    for column, candidate in enumerate(candidates[constraint.conv], starts[constraint.conv]):
        count = getattr(candidate, constraint.key)
        row[0, column] = 0 if count is None else count - constraint.total
    for part in constraint.ranges:
        for column, candidate in enumerate(candidates[part.group], starts[part.group]):
            row[0, column] = 0 if candidate.kept is None else part.per_channel * (part.size - len(candidate.kept))
    return row.tocsr()


@contextmanager
def _silence_stdout() -> Iterator[None]:
    """Discard what the solver's library writes to file descriptor 1, which its options do not prevent."""
    sys.stdout.flush()
    stdout, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(null)
