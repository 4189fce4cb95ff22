"""Symmetric linear systems that may be singular: damped, in batches."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 1e-7
CAUTION = 0.01


def solve_ridge(uu: Tensor, uy: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """argmin_W ||y - W' u||^2 + lambda ||W - prior||^2 (a x b), lambda = ridge x the mean diagonal of uu (a x a)."""
    damping = max(ridge, DAMPING) * uu.diagonal().mean().clamp_min(torch.finfo(uu.dtype).tiny)
    return prior + solve_damped(uu, uy - uu @ prior, damping)


def damping_for(grams: Tensor, rows: float) -> Tensor:
    """A share of each matrix's mean diagonal that grows as there are fewer rows for its unknowns."""
    share = max(DAMPING, CAUTION * grams.shape[-1] / rows)
    return share * grams.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)


def solve_damped(matrix: Tensor, right: Tensor, damping: Tensor) -> Tensor:
    """(matrix + damping I) X = right for symmetric positive semi-definite matrices, batched; damped more if need be."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    damping = torch.as_tensor(damping, dtype=matrix.dtype)[..., None, None]
    for _ in range(8):
        factor, failed = torch.linalg.cholesky_ex(matrix + damping * eye)
        if not failed.any():
            if matrix.dim() > 2 and right.shape[-1] > matrix.shape[-1]:
                return torch.cholesky_inverse(factor) @ right  # the batched solver would go column by column
            return torch.cholesky_solve(right, factor)
        damping = damping.clamp_min(torch.finfo(matrix.dtype).eps) * 100
    return torch.linalg.lstsq(matrix + damping * eye, right).solution
