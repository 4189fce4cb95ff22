import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ghostify.budgeting import candidates, profile
from ghostify.budgeting.candidates import _Losses
from ghostify.budgeting.profile import Profile
from ghostify.modules.layout import Depthwise, GhostLayout, intrinsic_count


def test_few_images_are_not_taken_to_be_simple():
    """Directions found on a handful of rows leave more of the others than of themselves."""
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).double()
    halves = tuple(h.T @ h / len(h) for h in rows.split(6))
    eye = torch.eye(8, dtype=torch.float64)
    crossed = candidates._tails(profile.Profile(halves, None, eye))
    own = [candidates._tails(profile.Profile((h,), None, eye)) for h in halves]
    torch.testing.assert_close(own[0], torch.cat((torch.zeros(1), torch.linalg.eigvalsh(halves[0]).cumsum(0))))
    assert (crossed[1:-1] > (own[0] + own[1])[1:-1] / 2).all()
    assert crossed[-1] == pytest.approx(float((own[0] + own[1])[-1] / 2))


@given(st.integers(2, 12), st.sampled_from([1.25, 1.5, 2, 3, 4]), st.integers(0, 99))
def test_a_depthwise_layout_loses_no_less_than_hoped(n, ratio, seed):
    """So that what is beaten at the hoped loss need not be solved."""

    class Maps:
        def costs(self, weights):
            return torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * weights

    m = intrinsic_count(n, ratio)
    assume(m < n)
    losses = _Losses(Profile((torch.eye(n, dtype=torch.float64),), Maps(), torch.eye(n, dtype=torch.float64)), 3)
    layout = GhostLayout(n, m, Depthwise(3))
    assert losses.least(layout) <= losses.of(layout) + 1e-12
