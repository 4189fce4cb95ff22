import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostify.fitting.subset_selection import greedy_order, selection_error


def random_layer(maps, rows=200, seed=0):
    """Inputs of a linear consumer, their covariance, its filters, and its importance."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(maps, maps, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, maps, generator=generator, dtype=torch.float64) @ mixed
    filters = torch.randn(4, maps, generator=generator, dtype=torch.float64)
    return x, x.T @ x / rows, filters, filters.T @ filters


@given(st.integers(1, 12), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_the_selection_error_is_that_of_least_squares(maps, seed):
    x, covariance, filters, importance = random_layer(maps, seed=seed)
    order = greedy_order([covariance], [importance])
    assert sorted(order) == list(range(maps))
    errors = [selection_error(order[:k], covariance, covariance, importance, float("inf")) for k in range(1, maps + 1)]
    for k, error in enumerate(errors, 1):
        kept = x[:, order[:k]]
        residual = x - kept @ torch.linalg.lstsq(kept, x).solution
        assert error == pytest.approx(float((residual @ filters.T).square().sum(1).mean()), rel=1e-4, abs=1e-6)
    assert all(b <= a * (1 + 1e-6) + 1e-9 for a, b in itertools.pairwise(errors))


def test_every_step_selects_the_map_with_the_smallest_error():
    _, covariance, _, importance = random_layer(7)
    order = greedy_order([covariance], [importance])
    for k in range(6):
        errors = {
            j: selection_error([*order[:k], j], covariance, covariance, importance, float("inf")) for j in order[k:]
        }
        assert errors[order[k]] == pytest.approx(min(errors.values()), rel=1e-4, abs=1e-8)


def test_errors_of_several_consumers_are_summed():
    consumers = [random_layer(7, seed=seed) for seed in (1, 2)]
    order = greedy_order([c for _, c, _, _ in consumers], [importance for *_, importance in consumers])
    for k in range(6):
        errors = {
            j: sum(
                selection_error([*order[:k], j], c, c, importance, float("inf")) for _, c, _, importance in consumers
            )
            for j in order[k:]
        }
        assert errors[order[k]] == pytest.approx(min(errors.values()), rel=1e-4, abs=1e-8)


def test_copies_come_last():
    x, _, _, _ = random_layer(6)
    doubled = torch.cat((x, 2 * x), 1)
    covariance = doubled.T @ doubled / len(x)
    order = greedy_order([covariance], [torch.eye(12, dtype=torch.float64)])
    assert {k % 6 for k in order[:6]} == set(range(6))
    assert selection_error(order[:6], covariance, covariance, torch.eye(12).double(), 1e9) < 1e-4 * covariance.trace()


def test_maps_that_are_always_zero_come_last_and_have_no_error():
    covariance = torch.diag(torch.tensor([0.0, 2.0, 0.0, 1.0], dtype=torch.float64))
    order = greedy_order([covariance], [torch.eye(4, dtype=torch.float64)])
    assert order == [1, 3, 0, 2]
    assert selection_error(order[:2], covariance, covariance, torch.eye(4).double(), 1e9) == pytest.approx(0, abs=1e-9)
