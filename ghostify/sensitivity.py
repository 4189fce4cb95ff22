"""How much the model's outputs feel an error in each convolution's output channels, on calibration images."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ghostify.trace import Program
from ghostify.walk import Chunk, Watched

IMAGES = 256
PROBES = 4


def output_sensitivity(
    program: Program, chunks: Iterable[Chunk], *, images: int = IMAGES, probes: int = PROBES, seed: int = 0
) -> dict[str, Tensor]:
    """By convolution, the relative squared error of the model's outputs per squared error of each channel (n, float64).

    An error with variance e_j at every position of channel j raises the outputs' error, relative to their variance over
    images, by about sum_j s_j e_j: s_j is the sum over positions of the squared gradient of a random combination of
    the outputs, averaged over images and combinations (Hutchinson's estimator of the diagonal of J'J). Empty where
    the outputs have no gradient, or the model overwrites what a gradient would need.
    """
    names = {call.node: c.name for c in program.convolutions if c.obstacle is None for call in c.calls}
    module = copy.deepcopy(program.module).eval().requires_grad_(False)
    batches = list(_first(chunks, images))
    spreads = _spreads(module, batches)
    sums: dict[str, Tensor] = {}
    first = 0
    for inputs in batches:
        taps: dict[str, Tensor] = {}
        with torch.enable_grad():
            outputs = _tensors(
                Watched(module, set(names), partial(_tap, taps)).run(*inputs, enable_io_processing=False)
            )
        if not any(o.requires_grad for o in outputs):
            return {}
        for probe in range(probes):
            drawn = [_draw(o, (seed * probes + probe) * 1_000_003 + first) for o in outputs]
            total = torch.stack([(d * o).sum() / s for d, o, s in zip(drawn, outputs, spreads, strict=True)]).sum()
            try:
                gradients = torch.autograd.grad(
                    total, list(taps.values()), retain_graph=probe < probes - 1, allow_unused=True
                )
            except RuntimeError:
                return {}
            for node, gradient in zip(taps, gradients, strict=True):
                if gradient is not None:
                    each = gradient.double().square().sum((0, 2, 3)).cpu()
                    sums[names[node]] = sums.get(names[node], torch.zeros_like(each)) + each
        first += _count(inputs)
    return {name: total / (probes * first) for name, total in sums.items()}


def _tap(taps: dict[str, Tensor], node: str, output: Tensor) -> Tensor:
    """The output plus a zero by which gradients can be taken."""
    taps[node] = torch.zeros_like(output, requires_grad=True)
    return output + taps[node]


def _first(chunks: Iterable[Chunk], images: int) -> Iterator[list[Any]]:
    """Inputs of the first `images` images."""
    for chunk in chunks:
        if images <= 0:
            return
        alike = [isinstance(v, Tensor) and v.dim() > 0 and len(v) == chunk.size for v in chunk.inputs]
        yield [v[:images] if same else v for v, same in zip(chunk.inputs, alike, strict=True)]
        images -= chunk.size


def _count(inputs: list[Any]) -> int:
    return len(next(v for v in inputs if isinstance(v, Tensor) and v.dim() > 0))


def _tensors(outputs: Any) -> list[Tensor]:
    return [o for o in tree_leaves(outputs) if isinstance(o, Tensor) and o.is_floating_point()]


def _spreads(module: fx.GraphModule, batches: list[list[Any]]) -> list[Tensor]:
    """The standard deviation of each output over images, all its values together; of one image, its size."""
    with torch.no_grad():
        runs = [_tensors(fx.Interpreter(module).run(*inputs, enable_io_processing=False)) for inputs in batches]
    count = sum(_count(inputs) for inputs in batches)
    spreads = []
    for outputs in zip(*runs, strict=True):
        square = sum((o.double().square().sum() for o in outputs), torch.zeros((), dtype=torch.float64)) / count
        mean = torch.zeros(()) if count == 1 or outputs[0].dim() == 0 else _mean(outputs, count)
        spreads.append((square - mean.square().sum()).clamp_min(1e-6 * square + 1e-30).sqrt().float())
    return spreads


def _mean(outputs: tuple[Tensor, ...], count: int) -> Tensor:
    if len({o.shape[1:] for o in outputs}) > 1:
        return torch.zeros(())
    return torch.stack([o.double().sum(0) for o in outputs]).sum(0) / count


def _draw(output: Tensor, seed: int) -> Tensor:
    """Normal values, the same for an image wherever it stands in a batch."""
    if output.dim() == 0:
        return torch.ones_like(output)
    each = [
        torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(seed + k)) for k in range(len(output))
    ]
    return torch.stack(each).to(output)
