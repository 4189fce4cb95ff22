"""Damped solves and factors of symmetric systems that may be singular, in batches."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_RELATIVE_DAMPING = 1e-7
DAMPING_PER_UNKNOWN = 0.01
MAX_ATTEMPTS = 20
OVERSAMPLED_VECTORS = 16
SUBSPACE_ITERATIONS = 3


def solve_ridge(uu: Tensor, uy: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """argmin_W ||y - W' u||^2 + lambda ||W - prior||^2 (a x b), lambda = ridge x the mean diagonal of uu (a x a)."""
    damping = max(ridge, MIN_RELATIVE_DAMPING) * uu.diagonal().mean().clamp_min(torch.finfo(uu.dtype).tiny)
    return prior + solve_damped(uu, uy - uu @ prior, damping)


def best_share(slope: float, curvature: float) -> float:
    """The share s in [0, 1] of a change with the smallest error, which is s^2 `curvature` / 2 - s `slope` and more."""
    return min(max(slope / curvature, 0.0), 1.0) if curvature > 0 else 0.0


def damping_for(grams: Tensor, rows: float) -> Tensor:
    """A share of each matrix's mean diagonal, proportional to the number of unknowns per row."""
    share = max(MIN_RELATIVE_DAMPING, DAMPING_PER_UNKNOWN * grams.shape[-1] / rows)
    return share * grams.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)


def solve_damped(matrix: Tensor, right: Tensor, damping: Tensor) -> Tensor:
    """X of (matrix + damping I) X = right, positive semi-definite, batched; damped more where needed."""
    return torch.cholesky_solve(right, factor_damped(matrix, damping))


def explained_variance(matrix: Tensor, right: Tensor, damping: Tensor) -> Tensor:
    """diag(right' (matrix + damping I)^-1 right), batched: the variance that least squares explain."""
    factor = factor_damped(matrix, damping)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype).expand_as(factor)
    return (torch.linalg.solve_triangular(factor, eye, upper=False) @ right).square_().sum(-2)


def factor_damped(matrix: Tensor, damping: Tensor) -> Tensor:
    """The lower triangular factor of matrix + damping I, batched; damped more where needed."""
    damping = torch.as_tensor(damping, dtype=matrix.dtype)[..., None]
    rounding = torch.finfo(matrix.dtype).eps * matrix.abs().amax((-2, -1)).clamp_min(1)[..., None]
    for _ in range(MAX_ATTEMPTS):
        damped = matrix.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            return factor
        damping = damping.clamp_min(rounding) * 100
    return torch.linalg.cholesky(damped)  # raises with the reason


def cholesky_root(matrix: Tensor) -> Tensor:
    """Lower triangular L with L L' = matrix, symmetric positive semi-definite, up to rounding."""
    return factor_damped(matrix, 1e-12 * matrix.diagonal().mean() + torch.finfo(matrix.dtype).tiny)


def leading_vectors(matrix: Tensor, count: int) -> Tensor:
    """Orthonormal vectors of (nearly) the `count` largest eigenvalues of a symmetric matrix (n x n): n x count.

    If they are few, by subspace iteration from a fixed start, which is accurate enough for a choice of basis.
    """
    matrix = (matrix + matrix.T) / 2
    if len(matrix) < 4 * count:
        return torch.linalg.eigh(matrix).eigenvectors[:, -count:]
    generator = torch.Generator().manual_seed(0)
    space = torch.randn(len(matrix), count + OVERSAMPLED_VECTORS, generator=generator, dtype=matrix.dtype)
    for _ in range(SUBSPACE_ITERATIONS):
        space = torch.linalg.qr(matrix @ space).Q
    within = space.T @ matrix @ space
    return space @ torch.linalg.eigh((within + within.T) / 2).eigenvectors[:, -count:]
