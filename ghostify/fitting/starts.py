"""Ghost weights that nothing was fitted to: where others start, and enough to measure time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ghostify.fitting.assign import in_given_order
from ghostify.ghost import GhostWeights
from ghostify.narrow import narrowed_conv
from ghostify.planning.plan import Plan, Rewrite
from ghostify.tracing.program import Program

Kernels = Callable[[Rewrite, Tensor], Tensor]


def unfitted(
    program: Program, plan: Plan, kernels: Kernels | None = None, *, shuffled: bool = False, seed: int = 0
) -> dict[str, GhostWeights]:
    """The first m filters kept, the others' channels from cheap kernels at random (Kaiming), or as `kernels` makes
    them from a rewrite and the whole weight. With `shuffled`, channels stand in an order such as a fit would choose.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(entry: Rewrite, _: Tensor) -> Tensor:
        width, d = entry.layout.width, entry.layout.dw_size
        return torch.randn(entry.layout.ghosts, width, d, d, generator=generator) * (2 / (width * d * d)) ** 0.5

    weights = {}
    for entry in plan.rewrites:
        conv, layout, narrowing = program.conv(entry.conv.name), entry.layout, entry.narrowing
        if narrowing is not None:
            conv = narrowed_conv(conv, narrowing.kept_out, narrowing.kept_in)
        m, whole = layout.intrinsic, conv.weight.detach()
        primary = cheap = None
        if conv.bias is not None:
            primary, cheap = conv.bias.detach()[:m], conv.bias.detach()[m:]
        made = (kernels or drawn)(entry, whole)
        given = in_given_order(layout).channels
        channels = torch.randperm(len(given), generator=generator) if shuffled else given
        weights[entry.conv.name] = GhostWeights(channels, whole[:m], primary, made, cheap)
    return weights
