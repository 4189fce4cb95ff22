import itertools
import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostify.budgeting import solve as solving
from ghostify.budgeting.candidates import Candidate
from ghostify.budgeting.solve import solve


@given(st.integers(1, 4), st.integers(0, 999), st.floats(0.1, 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_choice_is_the_best_of_all(layers, seed, share, parted):
    generator = torch.Generator().manual_seed(seed)

    def number():
        return float(torch.rand((), generator=generator))

    choices = [[Candidate(None, (number(), number()), number()) for _ in range(4)] for _ in range(layers)]
    limits = [share * sum(max(c.costs[k] for c in options) for options in choices) for k in range(2)]
    apart = list(itertools.combinations(range(layers), 2))[:2] if parted else []
    possible = [
        (sum(c.loss for c in picks), picks)
        for picks in itertools.product(*choices)
        if all(sum(c.costs[k] for c in picks) <= limit for k, limit in enumerate(limits))
        and all(picks[i] is choices[i][0] or picks[j] is choices[j][0] for i, j in apart)
    ]
    found = solve(choices, limits, apart)
    if not possible:
        assert found is None
        return
    picks = [options[i] for options, i in zip(choices, found, strict=True)]
    assert all(sum(c.costs[k] for c in picks) <= limit * (1 + 1e-6) + 1e-9 for k, limit in enumerate(limits))
    assert sum(c.loss for c in picks) <= min(loss for loss, _ in possible) + 1e-3
    assert all(found[i] == 0 or found[j] == 0 for i, j in apart)


def test_what_a_library_writes_past_python_stays_out_of_standard_output(capfd):
    with solving._mute():
        os.write(1, b"a remark of the solver")
    print("ours", flush=True)
    assert capfd.readouterr().out == "ours\n"
