import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostify.search.measured_losses import MIN_LOSS, corrected_losses

LOSSES = st.floats(1e-9, 10)


@given(st.lists(st.tuples(LOSSES, LOSSES, st.booleans()), min_size=1))
def test_measured_losses_are_kept_and_others_scaled_by_factors_between_theirs(rows):
    predicted = [loss for loss, _, _ in rows]
    measured = {k: loss for k, (_, loss, is_measured) in enumerate(rows) if is_measured}
    corrected = corrected_losses(predicted, measured)
    factors = [max(loss, MIN_LOSS) / max(predicted[k], MIN_LOSS) for k, loss in measured.items()]
    for k, (before, after) in enumerate(zip(predicted, corrected, strict=True)):
        if k in measured:
            assert after == measured[k]
        elif measured:
            assert min(factors) * 0.999 <= after / max(before, MIN_LOSS) <= max(factors) * 1.001
        else:
            assert after == before


def test_factors_are_interpolated_between_logarithms():
    corrected = corrected_losses([0.0, 1e-4, 1e-3, 1e-2, 1.0], {1: 1e-4, 3: 1.0})
    assert corrected == pytest.approx([0.0, 1e-4, 1e-2, 1.0, 100.0])
