import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostify.fitting.error_measure import ErrorMeasure
from ghostify.fitting.holdout import HoldoutSums


@given(st.integers(0, 99))
def test_sums_over_batches_give_the_errors_of_all_rows(seed):
    generator = torch.Generator().manual_seed(seed)
    target, noise = (torch.randn(40, 3, generator=generator, dtype=torch.float64) + 1 for _ in range(2))
    sensitivity = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    sums = HoldoutSums(3)
    for rows in torch.arange(40).split(7):
        sums.add((target + noise)[rows], target[rows])
    scales = target.var(0, correction=0)
    errors = sums.errors(sensitivity, ErrorMeasure(torch.eye(3), scales))
    assert errors is not None
    torch.testing.assert_close(errors.relative, noise.square().mean(0) / scales)
    assert errors.output_error == pytest.approx(((noise @ sensitivity) * noise).sum(1).mean().item())


def test_without_holdout_rows_there_are_no_errors():
    assert HoldoutSums(3).errors(None, ErrorMeasure(torch.eye(3), torch.ones(3))) is None
