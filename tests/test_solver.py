import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostify import GhostifyError
from ghostify.search import solver as solving
from ghostify.search.candidates import Candidate
from ghostify.search.solver import GroupConstraint, GroupRange, SumConstraint, choose_candidates

KEPT = ((0,), (0, 2))


@given(st.integers(1, 3), st.integers(0, 999), st.floats(0.1, 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_choice_is_the_best_of_all(layers, seed, share, grouped):
    """For a chain of convolutions, with channel groups between them or without."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(**maps):
        costs = tuple(torch.rand(2, generator=generator).tolist())
        return Candidate(None, costs, float(torch.rand((), generator=generator)), **maps)

    constraints, counts = [], (None, *map(len, KEPT))
    if grouped:
        constraints += [GroupConstraint(k, layers + k, "kept_out_count") for k in range(layers - 1)]
        constraints += [GroupConstraint(k + 1, layers + k, "kept_in_count") for k in range(layers - 1)]
    constrained = {(constraint.conv, constraint.key) for constraint in constraints}
    candidates = [
        [
            drawn(kept_out_count=kept_out, kept_in_count=kept_in)
            for kept_out, kept_in in itertools.product(
                *(counts if (k, key) in constrained else (None,) for key in ("kept_out_count", "kept_in_count"))
            )
            for _ in range(2)
        ]
        for k in range(layers)
    ]
    candidates += [[drawn(kept=kept) for kept in (None, *KEPT)] for _ in range(layers - 1)] if grouped else []

    def agree(picks):
        kept = (picks[constraint.group].kept for constraint in constraints)
        return all(
            getattr(picks[constraint.conv], constraint.key) == (None if channels is None else len(channels))
            for constraint, channels in zip(constraints, kept, strict=True)
        )

    limits = [share * sum(max(c.costs[k] for c in alternatives) for alternatives in candidates) for k in range(2)]
    possible = [
        sum(c.loss for c in picks)
        for picks in itertools.product(*candidates)
        if agree(picks) and all(sum(c.costs[k] for c in picks) <= limit for k, limit in enumerate(limits))
    ]
    solution = choose_candidates(candidates, limits, constraints)
    if solution is None:
        assert not possible
        return
    picks = [alternatives[i] for alternatives, i in zip(candidates, solution, strict=True)]
    assert agree(picks)
    assert all(sum(c.costs[k] for c in picks) <= limit * (1 + 1e-6) + 1e-9 for k, limit in enumerate(limits))
    assert sum(c.loss for c in picks) <= min(possible, default=float("inf")) + 1e-3


def test_a_layer_that_reads_several_groups_costs_at_least_what_they_leave():
    reader = [Candidate(None, (float(n or 9),), 0.0, kept_in_count=n) for n in (None, 4, 6, 8)]
    left = [Candidate(None, (0.0,), loss, kept=kept) for kept, loss in ((None, 0.0), ((0,), 1.0), ((0, 1), 0.4))]
    right = [Candidate(None, (0.0,), loss, kept=kept) for kept, loss in ((None, 0.0), ((0,), 0.9))]
    ranges = (GroupRange(1, 1, 3), GroupRange(2, 2, 3))
    limits = {9: [0, 0, 0], 8: [3, 2, 0], 7: [2, 0, 1], 4: [1, 2, 1], 3: None}
    for limit, expected in limits.items():
        constraint = SumConstraint(0, "kept_in_count", 9, ranges)
        assert choose_candidates([reader, left, right], [float(limit)], [constraint]) == expected


def test_a_timeout_is_not_infeasibility(monkeypatch):
    monkeypatch.setattr(solving, "SECONDS", 0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(40, 30, 3, generator=generator).tolist()
    candidates = [[Candidate(None, (a, b), loss) for a, b, loss in alternatives] for alternatives in rows]
    with pytest.raises(GhostifyError, match=r"budget: no plan found in 0 s .*\. Target fewer layers"):
        choose_candidates(candidates, [12.0, 12.0])


def test_what_a_library_writes_past_python_stays_out_of_standard_output(capfd):
    with solving._silence_stdout():
        os.write(1, b"a remark of the solver")
    print("ours", flush=True)
    assert capfd.readouterr().out == "ours\n"


@pytest.mark.parametrize("unknown", [Candidate(None, (0.1,), float("nan")), Candidate(None, (float("inf"),), 0.0)])
def test_a_candidate_without_a_finite_loss_and_cost_is_not_chosen(unknown):
    alternatives = [Candidate(None, (1.0,), 0.0), unknown, Candidate(None, (0.5,), 0.3)]
    assert choose_candidates([alternatives], [0.6]) == [2]
    assert choose_candidates([[alternatives[0], unknown]], [0.6]) is None
