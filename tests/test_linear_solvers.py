import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostify.fitting import linear_solvers


def moments(size, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return u @ u.T


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_explained_variance_is_that_of_the_solution(size, targets, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = moments(size, size + 2, seed).expand(3, -1, -1)
    right = torch.randn(3, size, targets, generator=generator, dtype=torch.float64)
    damping = torch.full((3,), 0.1, dtype=torch.float64)
    expected = (right * linear_solvers.solve_damped(matrix, right, damping)).sum(1)
    torch.testing.assert_close(linear_solvers.explained_variance(matrix, right, damping), expected)


def test_the_damped_solution_solves_the_damped_system():
    matrix, right = moments(5, 5), torch.eye(5, dtype=torch.float64)
    solution = linear_solvers.solve_damped(matrix, right, torch.tensor(0.5))
    torch.testing.assert_close(solution, torch.linalg.inv(matrix + 0.5 * torch.eye(5)))


def test_singular_matrices_are_damped_more():
    solution = linear_solvers.solve_damped(torch.zeros(2, 3, 3), torch.ones(2, 3, 1), torch.zeros(2))
    assert solution.isfinite().all()


def test_matrices_with_nan_are_an_error():
    with pytest.raises(torch.linalg.LinAlgError):
        linear_solvers.factor_damped(torch.full((2, 2), float("nan")), torch.tensor(1.0))


@pytest.mark.parametrize("count", [2, 20])
def test_leading_vectors_span_the_space_of_eigh(count):
    matrix = moments(40, count)
    vectors = linear_solvers.leading_vectors(matrix, count)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(count, dtype=torch.float64))
    expected = torch.linalg.eigh(matrix).eigenvectors[:, -count:]
    torch.testing.assert_close(vectors @ vectors.T, expected @ expected.T)
