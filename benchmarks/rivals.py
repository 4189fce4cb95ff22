"""Other ways to halve a network's multiply-accumulates, each as its users get it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from ghostify.cost import count_macs

STEPS = 12
LANES = 8


def pruned(model: nn.Module, x: Tensor, share: float, importance: Any = None) -> nn.Module:
    """Torch-Pruning: whole channels by magnitude, uniformly, in multiples of 8, at `share` of the MACs."""

    def cut(ratio: float) -> nn.Module:
        small = copy.deepcopy(model)
        classifiers = [m for m in small.modules() if isinstance(m, nn.Linear)][-1:]
        torch_pruning.pruner.MagnitudePruner(
            small,
            x,
            importance=importance or torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=classifiers,
            round_to=LANES,
        ).step()
        return small.eval()

    return _until(cut, x, share * count_macs(model, x))


def low_rank(model: nn.Module, x: Tensor, share: float) -> nn.Module:
    """Every dense convolution but the first as k x k to r maps and 1 x 1 from them, by its singular vectors."""

    def cut(ratio: float) -> nn.Module:
        small = copy.deepcopy(model)
        dense = [n for n, m in small.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
        for name in dense[1:]:
            small.set_submodule(name, _factored(small.get_submodule(name), 1 - ratio))
        return small

    return _until(cut, x, share * count_macs(model, x))


def _until(cut: Callable[[float], nn.Module], x: Tensor, macs: float) -> nn.Module:
    """What the least ratio leaves that keeps within the MACs, by bisection."""
    low, high, best = 0.0, 1.0, None
    for _ in range(STEPS):
        ratio = (low + high) / 2
        try:
            made = cut(ratio)
            fits = count_macs(made, x) <= macs
        except (RuntimeError, ValueError):  # nothing is left of a layer
            high = ratio
            continue
        if fits:
            best, high = made, ratio
        else:
            low = ratio
    if best is None:
        raise SystemExit("no ratio keeps within these multiply-accumulates")
    return best


@torch.no_grad()
def _factored(conv: Any, share: float) -> nn.Module:
    """Two convolutions at `share` of the MACs of one, or it itself where none saves."""
    n, c, kernel = conv.out_channels, conv.in_channels, conv.kernel_size
    taps = c * kernel[0] * kernel[1]
    rank = max(1, int(share * n * taps / (n + taps)))
    if rank >= min(n, taps):
        return conv
    u, s, v = torch.linalg.svd(conv.weight.flatten(1), full_matrices=False)
    first = nn.Conv2d(c, rank, kernel, conv.stride, conv.padding, conv.dilation, bias=False)
    second = nn.Conv2d(rank, n, 1, bias=conv.bias is not None)
    first.weight.copy_((s[:rank].sqrt()[:, None] * v[:rank]).unflatten(1, (c, *kernel)))
    second.weight.copy_((u[:, :rank] * s[:rank].sqrt())[:, :, None, None])
    if conv.bias is not None:
        second.bias.copy_(conv.bias)
    return nn.Sequential(first, second)
