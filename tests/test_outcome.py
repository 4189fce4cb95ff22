from dataclasses import replace

import pytest

from ghostify.reporting.outcome import describe_outcome, outcome_of
from ghostify.summary import LayerReport

GHOSTS = LayerReport("a", "Conv2d", (8, 3, 3, 3), None, None, 4, 1, 3, False, 1, 1, 1, 1)
SKIPPED = replace(GHOSTS, width=0, dw_size=0, intrinsic=8, skip_reason="no rule targets it")
PRUNED = replace(GHOSTS, width=0, dw_size=0, intrinsic=5, kept_out_count=5, kept_in_count=3)
PRUNED_GHOSTS = replace(GHOSTS, kept_out_count=6, kept_in_count=2)


@pytest.mark.parametrize(
    ("layer", "kind", "with_counts", "without_counts"),
    [
        (GHOSTS, "depthwise ghosts", "4 + 4, d=3", "depthwise ghosts"),
        (replace(GHOSTS, width=2), "wider ghosts", "4 + 4, d=3, w=2", "wider ghosts, w=2"),
        (replace(GHOSTS, width=4, dw_size=1), "wider ghosts", "4 + 4, d=1, w=4", "wider ghosts, w=4"),
        (
            replace(GHOSTS, activated=True, reorders_output=True),
            "depthwise ghosts",
            "4 + 4, d=3, activated, reordered",
            "depthwise ghosts, activated, reordered",
        ),
        (
            replace(GHOSTS, holdout_error=0.4),
            "depthwise ghosts",
            "4 + 4, d=3, fitted without images",
            "depthwise ghosts, fitted without images",
        ),
        (SKIPPED, "skipped", "no rule targets it", "no rule targets it"),
        (PRUNED, "pruned", "3 maps to 5", "pruned: 3 to 5"),
        (PRUNED_GHOSTS, "depthwise ghosts", "2 maps to 4 + 2, d=3", "depthwise ghosts: 2 to 6"),
    ],
)
def test_outcomes_in_words(layer, kind, with_counts, without_counts):
    assert outcome_of(layer) == kind
    assert describe_outcome(layer) == with_counts
    assert describe_outcome(layer, counts=False) == without_counts
