"""Ghost weights that nothing was fitted to: where others start, and enough to measure time."""

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
    """The first m filters kept, the others' channels from cheap kernels at random (Kaiming), or as `kernels` makes
    them from a rewrite and the whole weight. With `shuffled`, channels stand in an order such as a fit would choose.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(entry: GhostRewrite, _: Tensor) -> Tensor:
        shape = entry.layout.kernel_shape
        return torch.randn(entry.layout.ghosts, *shape, generator=generator) * (2 / math.prod(shape)) ** 0.5

    weights = {}
    for entry in plan.rewrites:
        conv, layout, narrowing = program.conv(entry.conv.name), entry.layout, entry.kept_channels
        if narrowing is not None:
            conv = slice_conv(conv, narrowing.kept_out, narrowing.kept_in)
        m, whole = layout.intrinsic, conv.weight.detach()
        primary = cheap = None
        if conv.bias is not None:
            primary, cheap = conv.bias.detach()[:m], conv.bias.detach()[m:]
        made = (kernels or drawn)(entry, whole)
        n = layout.outputs
        channels = torch.randperm(n, generator=generator) if shuffled else torch.arange(n)
        weights[entry.conv.name] = GhostWeights(channels, whole[:m], primary, made, cheap)
    return weights
