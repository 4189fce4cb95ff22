"""Convolutions and norms with fewer maps than the original's: ordinary torch, knows no graphs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ghostify.graph.op_queries import channel_tensors
from ghostify.modules.ghost import is_channels_last

Norm = TypeVar("Norm", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class PrunedConvWeights:
    """Fitted weights of a convolution that keeps its form but not all its maps.

    `shift` holds the constants that the BatchNorm behind takes up; it, `fit_error`, `holdout_error` (relative, as in
    `GhostWeights`) and `bias` are by the outputs that are left. `output_error` is the error to expect in the model's
    outputs.
    """

    weight: Tensor
    bias: Tensor | None
    shift: Tensor | None
    fit_error: Tensor
    holdout_error: Tensor | None = None
    output_error: float | None = None


@torch.no_grad()
def slice_conv(conv: nn.Conv2d, kept_out: Sequence[int] | None, kept_in: Sequence[int] | None) -> nn.Conv2d:
    """A copy that makes the outputs `kept_out` of the inputs `kept_in` (None: all); of a depthwise one both are the
    same."""
    made = copy.deepcopy(conv)
    weight = conv.weight if kept_out is None else conv.weight[list(kept_out)]
    if conv.groups > 1:
        made.groups = len(weight)
    elif kept_in is not None:
        weight = weight[:, list(kept_in)]
    form = torch.channels_last if is_channels_last(conv.weight) else torch.contiguous_format
    made.weight = nn.Parameter(weight.clone(memory_format=form), conv.weight.requires_grad)
    if conv.bias is not None and kept_out is not None:
        made.bias = nn.Parameter(conv.bias[list(kept_out)].clone(), conv.bias.requires_grad)
    made.out_channels, made.in_channels = len(weight), weight.shape[1] * made.groups
    return made


@torch.no_grad()
def slice_linear(layer: nn.Linear, kept_out: Sequence[int] | None, kept_in: Sequence[int] | None) -> nn.Linear:
    """A copy of a linear layer that makes the outputs `kept_out` of the inputs `kept_in` (None: all)."""
    made = copy.deepcopy(layer)
    weight = layer.weight if kept_out is None else layer.weight[list(kept_out)]
    weight = weight if kept_in is None else weight[:, list(kept_in)]
    made.weight = nn.Parameter(weight.clone(), layer.weight.requires_grad)
    if layer.bias is not None and kept_out is not None:
        made.bias = nn.Parameter(layer.bias[list(kept_out)].clone(), layer.bias.requires_grad)
    made.out_features, made.in_features = weight.shape
    return made


@torch.no_grad()
def slice_tensor(module: nn.Module, name: str, kept: Sequence[int] | Tensor) -> None:
    """Leave some entries of a parameter or buffer that a module holds, in place; the module's own count follows."""
    tensor = getattr(module, name)
    own = tensor[torch.as_tensor(kept, device=tensor.device)].clone()
    setattr(module, name, nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own)
    for count in ("num_features", "num_parameters"):
        if hasattr(module, count):
            setattr(module, count, len(own))


@torch.no_grad()
def slice_norm(norm: Norm, channels: Sequence[int] | Tensor) -> Norm:
    """A copy for some `channels` only, in their order, of a BatchNorm, a PReLU or whatever is made of such."""
    copied = copy.deepcopy(norm)
    for inner in copied.modules():
        for name in channel_tensors(inner):
            slice_tensor(inner, name, channels)
    return copied
