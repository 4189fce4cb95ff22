"""The paper's counts, of the ordinary networks' plans (`benchmarks/experiments/paper.py`)."""

import pytest

from benchmarks.experiments.paper import rows

ROWS = list(rows())


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r["how"])
def test_plans_count_what_the_paper_counts(row):
    weights, macs = row["paper"]
    digits = 2 if row["convention"] == "intrinsic" else 1
    if weights is not None and row["convention"] != "all by s":
        assert round(row["params"], digits) == pytest.approx(weights)
    elif weights is not None:
        assert row["params"] == pytest.approx(weights, rel=0.02)
    assert round(row["macs"], -2 if macs >= 1000 else 0) == macs
