"""Pruned networks with every convolution refitted to the original's outputs, layer after layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from ghostify.fitting.lstsq import refit_filters
from ghostify.fitting.moments import Moments, SplitMoments
from ghostify.fitting.patches import (
    extract_patches,
    flatten_filters,
    gather_positions,
    positions_per_map,
    sample_positions,
    unflatten_filters,
)

POSITIONS = 40_000
HELD_OUT = 4
SUMS = ("add", "iadd")


@torch.no_grad()
def compensated(model: nn.Module, small: nn.Module, kept: dict[str, Tensor], batches: tuple[Tensor, ...]) -> nn.Module:
    """A copy of a pruned model whose convolutions and linear layers are fitted by least squares, on present inputs.

    The target of each is the original's output on the same images, in the channels that are kept (`kept`, by name);
    before a residual sum, plus the error of the shortcut. The ridge, towards the pruned filters, is chosen on every
    fourth batch, as ghostify's own is. Both networks run once, in lockstep, all batches at a time.
    """
    whole, less = fx.symbolic_trace(copy.deepcopy(model)), fx.symbolic_trace(copy.deepcopy(small))
    runs = _Run(whole, batches), _Run(less, batches)
    for node in whole.graph.nodes:
        runs[0].step(node)
        layer = less.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            channels = kept[str(node.target)]
            wanted = [y[:, channels] for y in runs[0].values(node)]
            for y, lack in zip(wanted, _lacks(node, runs, channels), strict=False):
                y += lack
            _refit(layer, runs[1].values(node.args[0]), wanted)
        if isinstance(layer, nn.Linear):
            _refit(layer, runs[1].values(node.args[0]), runs[0].values(node))
        runs[1].step(node)
        for run in runs:
            run.forget(runs[0].batches[0].user_to_last_uses.get(node, ()))
    result = copy.deepcopy(small)
    for name, module in less.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            result.set_submodule(name, module)
    return result.eval()


class _Run:
    """One network's values for all batches, by node of the original's graph."""

    def __init__(self, module: fx.GraphModule, batches: tuple[Tensor, ...]) -> None:
        self.module = module.eval()
        self.batches = [fx.Interpreter(self.module) for _ in batches]
        for interpreter, batch in zip(self.batches, batches, strict=True):
            interpreter.args_iter = iter((batch.clone(),))

    def step(self, node: fx.Node) -> None:
        for interpreter in self.batches:
            interpreter.env[node] = interpreter.run_node(node)

    def values(self, node: fx.Node) -> list[Tensor]:
        return [interpreter.env[node] for interpreter in self.batches]

    def forget(self, nodes: Iterable[fx.Node]) -> None:
        for interpreter in self.batches:
            for node in nodes:
                del interpreter.env[node]


def _lacks(node: fx.Node, runs: tuple[_Run, _Run], channels: Tensor) -> list[Tensor]:
    """Error of the shortcut that is added to this convolution's norm, as the norm's input; empty without a shortcut."""
    norm = _only(node)
    total = None if norm is None else _only(norm)
    if norm is None or total is None or norm.op != "call_module" or getattr(total.target, "__name__", "") not in SUMS:
        return []
    module = runs[1].module.get_submodule(str(norm.target))
    shorts = [n for n in total.args if n is not norm]
    if not isinstance(module, nn.BatchNorm2d) or len(shorts) != 1 or shorts[0] not in runs[0].batches[0].env:
        return []
    scale = module.weight / (module.running_var + module.eps).sqrt()
    scale = torch.where(scale.abs() < 1e-2 * scale.abs().mean(), torch.inf, scale)
    both = zip(*(run.values(shorts[0]) for run in runs), strict=True)
    return [(a[:, channels] - b) / scale[:, None, None] for a, b in both]


def _only(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _refit(layer: nn.Conv2d | nn.Linear, inputs: list[Tensor], wanted: list[Tensor]) -> None:
    prior = flatten_filters(layer) if isinstance(layer, nn.Conv2d) else layer.weight.detach().double()
    parts = [Moments.zero(prior.shape[1], len(prior)) for _ in range(2)]
    share = positions_per_map(POSITIONS, sum(map(len, inputs)))
    for k, (x, y) in enumerate(zip(inputs, wanted, strict=True)):
        part = parts[k % HELD_OUT == HELD_OUT - 1]
        if isinstance(layer, nn.Conv2d):
            places = sample_positions(y.shape, share, k)
            part.add(extract_patches(layer, x, places), gather_positions(y, places))
        else:
            part.add(x, y)
    pair = SplitMoments(*parts)
    both = pair.all_rows
    filters = refit_filters(pair, prior.T, torch.ones(len(prior), dtype=torch.float64), free_mean=True)
    weight = unflatten_filters(filters.T, layer) if isinstance(layer, nn.Conv2d) else filters.T
    layer.weight.copy_(weight)
    layer.bias = nn.Parameter((both.mean_y - both.mean_u @ filters).float())
