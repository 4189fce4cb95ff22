"""Convolutions and norms with fewer maps than the original's: ordinary torch, knows no graphs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ghostify.ghost import is_channels_last
from ghostify.graph.op_queries import channel_tensors

Norm = TypeVar("Norm", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class DenseWeights:
    """Fitted weights of a convolution that keeps its form but not all its maps.

    `shift` holds the constants that the BatchNorm behind takes up; it, `error`, `held_out` (relative, as in
    `GhostWeights`) and `bias` are by the outputs that are left. `felt` is the error to expect in the model's outputs.
    """

    weight: Tensor
    bias: Tensor | None
    shift: Tensor | None
    error: Tensor
    held_out: Tensor | None = None
    felt: float | None = None


@torch.no_grad()
def narrowed_conv(conv: nn.Conv2d, keeps: Sequence[int] | None, reads: Sequence[int] | None) -> nn.Conv2d:
    """A copy that makes the outputs `keeps` of the inputs `reads` (None: all); of a depthwise one both are the same."""
    made = copy.deepcopy(conv)
    weight = conv.weight if keeps is None else conv.weight[list(keeps)]
    if conv.groups > 1:
        made.groups = len(weight)
    elif reads is not None:
        weight = weight[:, list(reads)]
    form = torch.channels_last if is_channels_last(conv.weight) else torch.contiguous_format
    made.weight = nn.Parameter(weight.clone(memory_format=form), conv.weight.requires_grad)
    if conv.bias is not None and keeps is not None:
        made.bias = nn.Parameter(conv.bias[list(keeps)].clone(), conv.bias.requires_grad)
    made.out_channels, made.in_channels = len(weight), weight.shape[1] * made.groups
    return made


@torch.no_grad()
def narrowed_norm(norm: Norm, channels: Sequence[int] | Tensor) -> Norm:
    """A copy for some `channels` only, in their order, of a BatchNorm, a PReLU or whatever is made of such."""
    copied = copy.deepcopy(norm)
    index = torch.as_tensor(channels)
    for inner in copied.modules():
        for name in channel_tensors(inner):
            value = getattr(inner, name)
            chosen = value[index.to(value.device)].clone()
            is_parameter = isinstance(value, nn.Parameter)
            setattr(inner, name, nn.Parameter(chosen, value.requires_grad) if is_parameter else chosen)
            for count in ("num_features", "num_parameters"):
                if hasattr(inner, count):
                    setattr(inner, count, len(index))
    return copied
