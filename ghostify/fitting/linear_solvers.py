"""Symmetric linear systems that may be singular: damped, in batches."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 1e-7
SAMPLE_DAMPING = 0.01
ATTEMPTS = 20
BEYOND = 16
ITERATIONS = 3


def solve_ridge(uu: Tensor, uy: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """argmin_W ||y - W' u||^2 + lambda ||W - prior||^2 (a x b), lambda = ridge x the mean diagonal of uu (a x a)."""
    damping = max(ridge, DAMPING) * uu.diagonal().mean().clamp_min(torch.finfo(uu.dtype).tiny)
    return prior + solve_damped(uu, uy - uu @ prior, damping)


def damping_for(grams: Tensor, rows: float) -> Tensor:
    """A share of each matrix's mean diagonal that grows as there are fewer rows for its unknowns."""
    share = max(DAMPING, SAMPLE_DAMPING * grams.shape[-1] / rows)
    return share * grams.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)


def solve_damped(matrix: Tensor, right: Tensor, damping: Tensor) -> Tensor:
    """(matrix + damping I) X = right for symmetric positive semi-definite matrices, batched; damped more if need be."""
    return torch.cholesky_solve(right, factor_damped(matrix, damping))


def explained_variance(matrix: Tensor, right: Tensor, damping: Tensor) -> Tensor:
    """diag(right' (matrix + damping I)^-1 right), batched: the variance that least squares take from the targets."""
    factor = factor_damped(matrix, damping)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype).expand_as(factor)
    return (torch.linalg.solve_triangular(factor, eye, upper=False) @ right).square_().sum(-2)


def factor_damped(matrix: Tensor, damping: Tensor) -> Tensor:
    """The lower triangular factor of matrix + damping I, batched; damped more if need be."""
    damping = torch.as_tensor(damping, dtype=matrix.dtype)[..., None]
    for _ in range(ATTEMPTS):
        damped = matrix.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            return factor
        damping = damping.clamp_min(torch.finfo(matrix.dtype).eps) * 100
    return torch.linalg.cholesky(damped)  # says what is wrong with it


def cholesky_root(matrix: Tensor) -> Tensor:
    """Lower triangular L with L L' = matrix, symmetric positive semi-definite, all but for rounding."""
    return factor_damped(matrix, 1e-12 * matrix.diagonal().mean() + torch.finfo(matrix.dtype).tiny)


def leading_vectors(matrix: Tensor, count: int) -> Tensor:
    """Orthonormal vectors of (nearly) the `count` largest eigenvalues of a symmetric matrix (n x n): n x count.

    Subspace iteration from a fixed start where they are few, which is exact enough to choose by.
    """
    matrix = (matrix + matrix.T) / 2
    if len(matrix) < 4 * count:
        return torch.linalg.eigh(matrix).eigenvectors[:, -count:]
    generator = torch.Generator().manual_seed(0)
    space = torch.randn(len(matrix), count + BEYOND, generator=generator, dtype=matrix.dtype)
    for _ in range(ITERATIONS):
        space = torch.linalg.qr(matrix @ space).Q
    within = space.T @ matrix @ space
    return space @ torch.linalg.eigh((within + within.T) / 2).eigenvectors[:, -count:]
