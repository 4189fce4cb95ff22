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
HOLDOUT_EVERY = 4
SUMS = ("add", "iadd")


@torch.no_grad()
def compensated(model: nn.Module, small: nn.Module, kept: dict[str, Tensor], batches: tuple[Tensor, ...]) -> nn.Module:
    """A copy of a pruned model whose convolutions and linear layers are fitted by least squares, on present inputs.

    The target of each is the original's output on the same images, in the channels that are kept (`kept`, by name);
    before a residual sum, plus the error of the shortcut. The ridge, towards the pruned filters, is chosen on every
    fourth batch, as in ghostify. Both networks run once, in lockstep, all batches at a time.
    """
    original, pruned = fx.symbolic_trace(copy.deepcopy(model)), fx.symbolic_trace(copy.deepcopy(small))
    runs = _Run(original, batches), _Run(pruned, batches)
    for node in original.graph.nodes:
        runs[0].step(node)
        layer = pruned.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            channels = kept[str(node.target)]
            targets = [y[:, channels] for y in runs[0].values(node)]
            for target, error in zip(targets, _shortcut_errors(node, runs, channels), strict=False):
                target += error
            _refit(layer, runs[1].values(node.args[0]), targets)
        if isinstance(layer, nn.Linear):
            _refit(layer, runs[1].values(node.args[0]), runs[0].values(node))
        runs[1].step(node)
        for run in runs:
            run.forget(runs[0].batches[0].user_to_last_uses.get(node, ()))
    result = copy.deepcopy(small)
    for name, module in pruned.named_modules():
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


def _shortcut_errors(node: fx.Node, runs: tuple[_Run, _Run], channels: Tensor) -> list[Tensor]:
    """Error of the shortcut that is added to this convolution's norm, as the norm's input; empty without a shortcut."""
    norm = _only_user(node)
    total = None if norm is None else _only_user(norm)
    if norm is None or total is None or norm.op != "call_module" or getattr(total.target, "__name__", "") not in SUMS:
        return []
    module = runs[1].module.get_submodule(str(norm.target))
    shortcuts = [n for n in total.args if n is not norm]
    if not isinstance(module, nn.BatchNorm2d) or len(shortcuts) != 1 or shortcuts[0] not in runs[0].batches[0].env:
        return []
    scale = module.weight / (module.running_var + module.eps).sqrt()
    scale = torch.where(scale.abs() < 1e-2 * scale.abs().mean(), torch.inf, scale)
    values = zip(*(run.values(shortcuts[0]) for run in runs), strict=True)
    return [(a[:, channels] - b) / scale[:, None, None] for a, b in values]


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _refit(layer: nn.Conv2d | nn.Linear, inputs: list[Tensor], targets: list[Tensor]) -> None:
    prior = flatten_filters(layer) if isinstance(layer, nn.Conv2d) else layer.weight.detach().double()
    moments = [Moments.zero(prior.shape[1], len(prior)) for _ in range(2)]
    share = positions_per_map(POSITIONS, sum(map(len, inputs)))
    for k, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        chosen = moments[k % HOLDOUT_EVERY == HOLDOUT_EVERY - 1]
        if isinstance(layer, nn.Conv2d):
            positions = sample_positions(y.shape, share, k)
            chosen.add(extract_patches(layer, x, positions), gather_positions(y, positions))
        else:
            chosen.add(x, y)
    split = SplitMoments(*moments)
    filters = refit_filters(split, prior.T, torch.ones(len(prior), dtype=torch.float64), free_mean=True)
    weight = unflatten_filters(filters.T, layer) if isinstance(layer, nn.Conv2d) else filters.T
    layer.weight.copy_(weight)
    layer.bias = nn.Parameter((split.fitted_rows.mean_y - split.fitted_rows.mean_u @ filters).float())
