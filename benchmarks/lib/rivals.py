"""Other compression methods, each as its users get it.

Each takes a model and calibration images and returns a `Compression`: a function from a ratio between 0 and 1 to a copy
of the model, which is smaller for a larger ratio. `smallest_ratio` searches the smallest ratio that meets a limit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorly
import torch
import torch_pruning
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lib.compensation import compensated
from ghostify.planning.cost import count_macs

STEPS = 12
LANES = 8
MAGNITUDE = torch_pruning.importance.MagnitudeImportance(p=2)
Compression = Callable[[float], nn.Module]


@dataclass(frozen=True, eq=False)
class CalibrationImages:
    """Calibration images in batches, and their labels for the methods that need them."""

    batches: tuple[Tensor, ...]
    labels: tuple[Tensor, ...] = ()

    @property
    def first(self) -> Tensor:
        return self.batches[0][:1]


def by_magnitude(model: nn.Module, calibration: CalibrationImages) -> Compression:
    """Torch-Pruning: whole channels by magnitude, uniformly."""
    return lambda ratio: _pruned(model, calibration.first, ratio, MAGNITUDE)[0]


def by_taylor(model: nn.Module, calibration: CalibrationImages) -> Compression:
    """Torch-Pruning: channels by first-order Taylor expansion of the loss; the only method here that reads labels."""
    differentiated = copy.deepcopy(model)
    for batch, labels in zip(calibration.batches, calibration.labels, strict=True):
        F.cross_entropy(differentiated(batch), labels).backward()
    gradients = {name: p.grad for name, p in differentiated.named_parameters()}

    def compress(ratio: float) -> nn.Module:
        return _pruned(model, calibration.first, ratio, torch_pruning.importance.GroupTaylorImportance(), gradients)[0]

    return compress


def by_least_squares(model: nn.Module, calibration: CalibrationImages) -> Compression:
    """Channels by magnitude, then every convolution fitted to the original's outputs (He et al., 2017, section 3)."""

    def compress(ratio: float) -> nn.Module:
        small, kept = _pruned(model, calibration.first, ratio, MAGNITUDE)
        return compensated(model, small, kept, calibration.batches)

    return compress


def low_rank(model: nn.Module, _: CalibrationImages) -> Compression:
    """Every dense convolution but the first as k x k to r maps and 1 x 1 from them, by its singular vectors."""
    return lambda ratio: _each(model, lambda conv: _factored(conv, 1 - ratio))


def tucker(model: nn.Module, _: CalibrationImages, *, approximate: bool = False) -> Compression:
    """Tucker-2 of every dense convolution but the first (Kim et al., 2016), by TensorLy: 1 x 1, k x k, 1 x 1.

    With `approximate`, the weights are approximate and the shapes the same, in less time.
    """

    def factor(conv: nn.Conv2d, share: float) -> nn.Module:
        return _factored(conv, share) if conv.kernel_size == (1, 1) else _tucker(conv, share, approximate)

    return lambda ratio: _each(model, lambda conv: factor(conv, 1 - ratio))


def decoupled(model: nn.Module, _: CalibrationImages) -> Compression:
    """Network decoupling (Guo et al., 2018): k x k as pairs of depthwise and pointwise, as many as the energy needs."""
    return lambda ratio: _each(model, lambda conv: conv if conv.kernel_size == (1, 1) else _decoupled(conv, ratio))


def smallest_ratio(
    compress: Compression, cost: Callable[[nn.Module], float], limit: float, steps: int = STEPS
) -> float | None:
    """The smallest ratio at which the model costs no more than the limit, by bisection; None if there is none."""
    low, high, best = 0.0, 1.0, None
    for _ in range(steps):
        ratio = (low + high) / 2
        try:
            meets_limit = cost(compress(ratio)) <= limit
        except (RuntimeError, ValueError):  # a layer has no channels left
            high = ratio
            continue
        if meets_limit:
            best = high = ratio
        else:
            low = ratio
    return best


def pruned(model: nn.Module, x: Tensor, share: float) -> nn.Module:
    """By magnitude, in multiples of 8 channels, at a share of the multiply-accumulates."""
    return _at(lambda ratio: _pruned(model, x, ratio, MAGNITUDE, lanes=LANES)[0], model, x, share)


def factored(model: nn.Module, x: Tensor, share: float) -> nn.Module:
    """By low rank, at a share of the multiply-accumulates."""
    return _at(low_rank(model, CalibrationImages((x,))), model, x, share)


def _at(compress: Compression, model: nn.Module, x: Tensor, share: float) -> nn.Module:
    ratio = smallest_ratio(compress, lambda m: count_macs(m, x), share * count_macs(model, x))
    if ratio is None:
        raise SystemExit("no ratio meets the limit of the multiply-accumulates")
    return compress(ratio)


def _pruned(
    model: nn.Module,
    x: Tensor,
    ratio: float,
    importance: Any,
    gradients: dict[str, Tensor] | None = None,
    lanes: int | None = None,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy with fewer channels, and the kept outputs of every convolution."""
    small = copy.deepcopy(model)
    for name, parameter in small.named_parameters():
        parameter.grad = None if gradients is None else gradients[name].clone()
    pruner = torch_pruning.pruner.MagnitudePruner(
        small, x, importance=importance, pruning_ratio=ratio, ignored_layers=[_output_layer(small)], round_to=lanes
    )
    convs = {m: name for name, m in small.named_modules() if isinstance(m, nn.Conv2d)}
    kept = {name: torch.ones(conv.out_channels, dtype=torch.bool) for conv, name in convs.items()}
    outputs = (torch_pruning.prune_conv_out_channels, torch_pruning.prune_depthwise_conv_out_channels)
    for group in pruner.step(interactive=True):
        for member, channels in group:
            if member.handler in outputs and member.target.module in convs:
                kept[convs[member.target.module]][channels] = False
        group.prune()
    for parameter in small.parameters():
        parameter.grad = None
    return small.eval(), {name: mask.nonzero().flatten() for name, mask in kept.items()}


def _each(model: nn.Module, change: Callable[[nn.Conv2d], nn.Module]) -> nn.Module:
    """A copy with every dense convolution changed but the first and the output layer."""
    small = copy.deepcopy(model)
    last = _output_layer(small)
    dense = [(n, m) for n, m in small.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and m is not last]
    with torch.no_grad():
        for name, conv in dense[1:]:
            small.set_submodule(name, change(conv))
    return small


def _output_layer(model: nn.Module) -> nn.Module:
    """The layer that computes the model's outputs, whose number does not change."""
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]


def _factored(conv: nn.Conv2d, share: float) -> nn.Module:
    """Two convolutions at `share` of the MACs of one, or the same convolution if these save nothing."""
    n, taps = conv.out_channels, conv.weight[0].numel()
    rank = max(1, int(share * n * taps / (n + taps)))
    if rank >= min(n, taps):
        return conv
    u, s, v = torch.linalg.svd(conv.weight.flatten(1), full_matrices=False)
    first = _like(
        conv, conv.in_channels, rank, (s[:rank].sqrt()[:, None] * v[:rank]).unflatten(1, conv.weight.shape[1:])
    )
    return nn.Sequential(first, _pointwise(u[:, :rank] * s[:rank].sqrt(), conv.bias))


def _tucker(conv: nn.Conv2d, share: float, approximate: bool = False) -> nn.Module:
    """Three convolutions, with `share` of the channels in the middle, or the same convolution if these save nothing."""
    n, c, kh, kw = conv.weight.shape
    r, q = max(1, round(share * n)), max(1, round(share * c))
    if c * q + q * r * kh * kw + r * n >= conv.weight.numel():
        return conv
    tensorly.set_backend("pytorch")
    options = {"init": "random", "n_iter_max": 1} if approximate else {"init": "svd"}
    (core, (out, into)), _ = partial_tucker(conv.weight.detach(), rank=[r, q], modes=[0, 1], **options)
    return nn.Sequential(_pointwise(into.T), _like(conv, q, r, core), _pointwise(out, conv.bias))


def _decoupled(conv: nn.Conv2d, energy_lost: float) -> nn.Module:
    """Depthwise kernels, as many for each input map, and one pointwise convolution, without the share `energy_lost`."""
    n, c, kh, kw = conv.weight.shape
    u, s, v = torch.linalg.svd(conv.weight.permute(1, 0, 2, 3).flatten(2), full_matrices=False)
    energy = s.square().sum(0)
    left = 1 - energy.cumsum(0) / energy.sum()
    pairs = int((left > energy_lost).sum()) + 1
    if pairs * c * (kh * kw + n) >= conv.weight.numel():
        return conv
    kernels = (s[:, :pairs, None] * v[:, :pairs]).reshape(c * pairs, 1, kh, kw)
    first = _like(conv, c, c * pairs, kernels, groups=c)
    return nn.Sequential(first, _pointwise(u[:, :, :pairs].transpose(1, 2).flatten(0, 1).T, conv.bias))


def _like(conv: nn.Conv2d, inputs: int, outputs: int, weight: Tensor, groups: int = 1) -> nn.Conv2d:
    """A convolution with the geometry of the given one: kernel size, stride, padding and dilation."""
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    similar = nn.Conv2d(inputs, outputs, *geometry, groups=groups, bias=False)
    similar.weight.copy_(weight)
    return similar


def _pointwise(weight: Tensor, bias: Tensor | None = None) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None)
    conv.weight.copy_(weight[:, :, None, None])
    if bias is not None:
        assert conv.bias is not None
        conv.bias.copy_(bias)
    return conv
