"""Untrained ghost weights, for timing and as baselines."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ghostify.graph.program import Program
from ghostify.modules.ghost import GhostWeights
from ghostify.planning.planner import GhostRewrite, Plan
from ghostify.pruning.slicing import slice_conv

Kernels = Callable[[GhostRewrite, Tensor], Tensor]


def untrained_weights(
    program: Program, plan: Plan, kernels: Kernels | None = None, *, shuffled: bool = False, seed: int = 0
) -> dict[str, GhostWeights]:
    """Ghost weights by convolution name: the first m filters, and random cheap kernels (Kaiming) for the other maps.

    `kernels` computes other kernels from a rewrite and the complete weight. With `shuffled`, the channels have a random
    order, as after a fit.
    """
    generator = torch.Generator().manual_seed(seed)

    def random_kernels(entry: GhostRewrite, _: Tensor) -> Tensor:
        shape = entry.layout.kernel_shape
        return torch.randn(entry.layout.ghosts, *shape, generator=generator) * (2 / math.prod(shape)) ** 0.5

    weights = {}
    for entry in plan.rewrites:
        conv, layout, kept = program.conv(entry.conv.name), entry.layout, entry.kept_channels
        if kept is not None:
            conv = slice_conv(conv, kept.kept_out, kept.kept_in)
        m, weight = layout.intrinsic, conv.weight.detach()
        primary_bias = cheap_bias = None
        if conv.bias is not None:
            primary_bias, cheap_bias = conv.bias.detach()[:m], conv.bias.detach()[m:]
        cheap_weight = (kernels or random_kernels)(entry, weight)
        n = layout.outputs
        channels = torch.randperm(n, generator=generator) if shuffled else torch.arange(n)
        weights[entry.conv.name] = GhostWeights(channels, weight[:m], primary_bias, cheap_weight, cheap_bias)
    return weights
