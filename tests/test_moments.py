import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostify.fitting.moments import Moments, PerMapMoments


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 99))
def test_moments_of_two_batches_add_up_to_those_of_all_rows(first, second, seed):
    generator = torch.Generator().manual_seed(seed)
    u, y = torch.randn(first + second, 3, generator=generator), torch.randn(first + second, 2, generator=generator)
    whole, a, b = (Moments.zero(3, 2) for _ in range(3))
    whole.add(u, y)
    a.add(u[:first], y[:first])
    b.add(u[first:], y[first:])
    for left, right in zip(whole.centred(), (a + b).centred(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_centred_moments_are_covariances():
    rows = torch.randn(500, 4, dtype=torch.float64) + 3
    moments = Moments.zero(4, 4)
    moments.add(rows, rows)
    expected = torch.cov(rows.T, correction=0)
    uu, uy, var = moments.centred()
    torch.testing.assert_close(uu, expected)
    torch.testing.assert_close(uy, expected)
    torch.testing.assert_close(var, expected.diagonal())
    torch.testing.assert_close(moments.raw()[0], rows.T @ rows / 500)


def test_per_map_moments_are_blocks_of_the_full_ones():
    v, y = torch.randn(60, 9, 4, dtype=torch.float64), torch.randn(60, 4, dtype=torch.float64)
    full, maps = Moments.zero(36, 4), PerMapMoments.zero(4, 9)
    full.add(v.flatten(1), y)
    maps.add(v[:20], y[:20])
    maps.add(v[20:], y[20:])
    gram = full.uu.reshape(9, 4, 9, 4)
    torch.testing.assert_close(maps.auto, torch.stack([gram[:, i, :, i] for i in range(4)]))
    torch.testing.assert_close(maps.cross, full.uy.reshape(9, 4, 4))
    torch.testing.assert_close((maps + maps).yy, 2 * full.yy)
