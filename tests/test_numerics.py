import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostify.numerics import (
    MIN_SHARE_OF_COSTS,
    Mismatch,
    derive_seed,
    error_scales,
    find_mismatch,
    first_not_finite,
    outputs_match,
    relative_squared_error,
    relative_to_variance,
)


def maps(seed):
    return torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 99))
def test_the_mean_has_an_error_of_one_and_the_reference_none(seed):
    reference = maps(seed) + 3
    assert relative_squared_error(reference, reference).item() == 0
    assert relative_squared_error(reference.mean(0).expand_as(reference), reference).item() == pytest.approx(1)


@given(st.integers(0, 99))
def test_errors_per_map_are_those_of_variances(seed):
    reference, estimate = maps(seed), maps(seed + 100)
    per_map = relative_squared_error(estimate, reference, over=(0, 2, 3), ignore_mean=True, per_map=True)
    expected = (estimate - reference).var((0, 2, 3)) / reference.var((0, 2, 3))
    torch.testing.assert_close(per_map, expected)
    shifted = estimate + torch.arange(3.0)[:, None, None]
    torch.testing.assert_close(
        relative_squared_error(shifted, reference, over=(0, 2, 3), ignore_mean=True, per_map=True), expected
    )


def test_a_reference_without_variance_is_divided_by_the_minimum():
    assert relative_squared_error(torch.ones(4, 1), torch.ones(4, 1)).item() == 0
    assert relative_to_variance(torch.tensor(2.0), torch.tensor(0.0), 0.5).item() == 4


def test_a_mismatch_says_how_far_and_of_what():
    reference = torch.tensor([10.0, 0.0])
    assert find_mismatch(reference + 0.09, reference, of_largest=0.01) is None
    mismatch = find_mismatch(reference + torch.tensor([0.0, 0.2]), reference, of_largest=0.01)
    assert mismatch is not None
    assert (mismatch.difference, mismatch.largest) == pytest.approx((0.2, 10))
    assert find_mismatch(torch.ones(2), torch.ones(3)) == Mismatch(math.inf, 1)
    assert find_mismatch(torch.tensor([math.nan, 0.0]), reference, of_largest=1.0) is not None


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(1e-4, 1))
def test_outputs_match_as_torch_says(a, b, tolerance):
    y, r = torch.tensor([a, math.nan, math.inf]), torch.tensor([b, math.nan, math.inf])
    expected = torch.allclose(y.double(), r.double(), tolerance, tolerance, equal_nan=True)
    assert outputs_match([y], [r], tolerance) == expected
    assert not outputs_match([y, y], [r], tolerance)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_neighbouring_seeds_share_no_derived_seed(first, second):
    assert derive_seed(5, first) != derive_seed(6, second) or first - second == 1_000_003


@pytest.mark.parametrize(
    ("name", "value", "is_refused"),
    [
        ("weight", "nan", True),
        ("weight", "inf", True),
        ("norm.running_var", "inf", True),
        ("mask", "-inf", False),
        ("mask", "nan", True),
        ("weight", "1", False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_the_first_tensor_that_is_not_finite_is_named(name, value, is_refused, dtype):
    tensors = {"count": torch.ones(2, dtype=torch.int64), name: torch.tensor([1.0, float(value)]).to(dtype)}
    assert first_not_finite(tensors, {"weight"}) == (name if is_refused else None)


def test_errors_of_channels_without_variance_are_not_divided_by_rounding():
    variance = torch.tensor([2.0, 1e-17, 0.0], dtype=torch.float64)
    mean_square = torch.tensor([3.0, 0.16, 0.0], dtype=torch.float64)
    errors = 1e-15 / error_scales(variance, mean_square, torch.ones(3))
    assert errors[0] == 1e-15 / 2
    assert errors.max() < 1e-4
    assert (error_scales(torch.zeros(2), torch.zeros(2), torch.ones(2)) > 0).all()


@given(st.lists(st.floats(1e-9, 1e3), min_size=6, max_size=6), st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6))
def test_channels_whose_errors_cost_little_count_little_in_the_mean(costs, weights):
    costs, weights = (torch.tensor(values, dtype=torch.float64) for values in (costs, weights))
    variance = costs / weights
    relative = variance / error_scales(variance, variance, weights)  # of an error as large as the variance
    assert (relative <= 1 + 1e-9).all()
    assert (relative <= costs / (MIN_SHARE_OF_COSTS * costs.mean()) + 1e-9).all()
