"""BatchNorm nodes, and the scale and shift of a BatchNorm in evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ghostify.graph.ops import op_of

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm


def batchnorm_of(module: nn.Module, node: fx.Node) -> BatchNorm | None:
    """The BatchNorm that a node of `module`'s graph calls, with an inner activation or not; None for other nodes."""
    op = op_of(module, node)
    if op is None or op.name != "batch_norm" or node.op != "call_module":
        return None
    return batchnorm_at(module, str(node.target))


def batchnorm_at(module: nn.Module, path: str | None) -> BatchNorm | None:
    """The BatchNorm at a path in `module`, None where `path` is None."""
    norm = None if path is None else module.get_submodule(path)
    assert norm is None or isinstance(norm, BatchNorm)
    return norm


def inner_modules(norm: nn.Module) -> dict[str, nn.Module]:
    """The modules that a norm applies to its normalised values, such as its activation, by name."""
    return {name: child for name, child in norm.named_children() if not isinstance(child, nn.Identity)}


def gamma_beta(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """The learned factor and constant of each channel (n); one and zero where the norm has none."""
    reference = norm.running_var if norm.running_var is not None else torch.empty(norm.num_features)
    gamma = torch.ones_like(reference) if norm.weight is None else norm.weight.detach()
    return gamma, torch.zeros_like(reference) if norm.bias is None else norm.bias.detach()


def batchnorm_affine(norm: BatchNorm, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel (n): in evaluation, the norm maps a value x to `scale * x + shift`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gamma, beta = gamma_beta(norm)
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt() * gamma.to(dtype)
    return scale, beta.to(dtype) - scale * norm.running_mean.to(dtype)


def has_running_statistics(module: nn.Module) -> bool:
    """Whether a module has a running mean, which training updates and evaluation uses."""
    return getattr(module, "running_mean", None) is not None
