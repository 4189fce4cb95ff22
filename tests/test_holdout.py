import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostify.fitting.holdout import HoldoutSums


@given(st.integers(0, 99), st.booleans())
def test_sums_over_batches_give_the_errors_of_all_rows(seed, free_mean):
    generator = torch.Generator().manual_seed(seed)
    target, noise = (torch.randn(40, 3, generator=generator, dtype=torch.float64) + 1 for _ in range(2))
    sensitivity = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    sums = HoldoutSums(3)
    for rows in torch.arange(40).split(7):
        sums.add((target + noise)[rows], target[rows])
    errors = sums.errors(sensitivity, free_mean=free_mean)
    assert errors is not None
    variance = target.var(0, correction=0) if free_mean else target.square().mean(0)
    torch.testing.assert_close(errors.relative, noise.square().mean(0) / variance)
    assert errors.output_error == pytest.approx(((noise @ sensitivity) * noise).sum(1).mean().item())


def test_without_holdout_rows_there_are_no_errors():
    assert HoldoutSums(3).errors(None, free_mean=True) is None
