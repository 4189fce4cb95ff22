"""BatchNorm behind a convolution: where it is, and what it does to each channel in evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ghostify.graph.ops import op_of

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm


def batchnorm_of(module: nn.Module, node: fx.Node) -> BatchNorm | None:
    """The BatchNorm that a node of `module`'s graph calls, an activation in it or not; None for other nodes."""
    op = op_of(module, node)
    if op is None or op.name != "batch_norm" or node.op != "call_module":
        return None
    return batchnorm_at(module, str(node.target))


def batchnorm_at(module: nn.Module, path: str | None) -> BatchNorm | None:
    """The BatchNorm at a path in `module`, None where there is no path."""
    norm = None if path is None else module.get_submodule(path)
    assert norm is None or isinstance(norm, BatchNorm)
    return norm


def inner_modules(norm: nn.Module) -> dict[str, nn.Module]:
    """What a norm applies to its normalised values, by name, such as its activation; nothing for a plain norm."""
    return {name: child for name, child in norm.named_children() if not isinstance(child, nn.Identity)}


def gamma_beta(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """The learned factor and constant of each channel (n), which are one and zero where the norm has none."""
    like = norm.running_var if norm.running_var is not None else torch.empty(norm.num_features)
    gamma = torch.ones_like(like) if norm.weight is None else norm.weight.detach()
    return gamma, torch.zeros_like(like) if norm.bias is None else norm.bias.detach()


def batchnorm_affine(norm: BatchNorm, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel (n): in evaluation, the norm makes `scale * x + shift` of a value x."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gamma, beta = gamma_beta(norm)
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt() * gamma.to(dtype)
    return scale, beta.to(dtype) - scale * norm.running_mean.to(dtype)


def has_running_statistics(module: nn.Module) -> bool:
    """Whether a module keeps a running mean, as norms do: training changes it, evaluation uses it."""
    return getattr(module, "running_mean", None) is not None
