"""Copies of convolutions, linear layers and norms with selected channels; independent of graphs."""

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
    """Fitted weights of a pruned convolution.

    `shift` are the constants that the following BatchNorm absorbs. `shift`, `bias`, `fit_error` and `holdout_error`
    (relative, as in `GhostWeights`) are by kept output. `output_error` is the predicted relative squared error of the
    model's outputs.
    """

    weight: Tensor
    bias: Tensor | None
    shift: Tensor | None
    fit_error: Tensor
    holdout_error: Tensor | None = None
    output_error: float | None = None


@torch.no_grad()
def slice_conv(conv: nn.Conv2d, kept_out: Sequence[int] | None, kept_in: Sequence[int] | None) -> nn.Conv2d:
    """A copy that computes the outputs `kept_out` from the inputs `kept_in` (None: all).

    A depthwise convolution keeps `kept_out` of both.
    """
    sliced = copy.deepcopy(conv)
    weight = conv.weight if kept_out is None else conv.weight[list(kept_out)]
    if conv.groups > 1:
        sliced.groups = len(weight)
    elif kept_in is not None:
        weight = weight[:, list(kept_in)]
    memory_format = torch.channels_last if is_channels_last(conv.weight) else torch.contiguous_format
    sliced.weight = nn.Parameter(weight.clone(memory_format=memory_format), conv.weight.requires_grad)
    if conv.bias is not None and kept_out is not None:
        sliced.bias = nn.Parameter(conv.bias[list(kept_out)].clone(), conv.bias.requires_grad)
    sliced.out_channels, sliced.in_channels = len(weight), weight.shape[1] * sliced.groups
    return sliced


@torch.no_grad()
def slice_linear(layer: nn.Linear, kept_out: Sequence[int] | None, kept_in: Sequence[int] | None) -> nn.Linear:
    """A copy of a linear layer that computes the outputs `kept_out` from the inputs `kept_in` (None: all)."""
    sliced = copy.deepcopy(layer)
    weight = layer.weight if kept_out is None else layer.weight[list(kept_out)]
    weight = weight if kept_in is None else weight[:, list(kept_in)]
    sliced.weight = nn.Parameter(weight.clone(), layer.weight.requires_grad)
    if layer.bias is not None and kept_out is not None:
        sliced.bias = nn.Parameter(layer.bias[list(kept_out)].clone(), layer.bias.requires_grad)
    sliced.out_features, sliced.in_features = weight.shape
    return sliced


@torch.no_grad()
def slice_tensor(module: nn.Module, name: str, kept: Sequence[int] | Tensor) -> None:
    """Keep some entries of a module's parameter or buffer, in place; updates `num_features` and `num_parameters`."""
    tensor = getattr(module, name)
    sliced = tensor[torch.as_tensor(kept, device=tensor.device)].clone()
    setattr(module, name, nn.Parameter(sliced, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else sliced)
    for count in ("num_features", "num_parameters"):
        if hasattr(module, count):
            setattr(module, count, len(sliced))


@torch.no_grad()
def slice_norm(norm: Norm, channels: Sequence[int] | Tensor) -> Norm:
    """A copy with `channels` only, in their order, of a BatchNorm, a PReLU or a module that consists of these."""
    sliced = copy.deepcopy(norm)
    for module in sliced.modules():
        for name in channel_tensors(module):
            slice_tensor(module, name, channels)
    return sliced
