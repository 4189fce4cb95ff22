"""Pruned networks with every convolution fitted anew to the original's outputs, layer after layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.fitting.lstsq import dense_prediction
from ghostify.fitting.moments import Moments, Pair
from ghostify.fitting.sight import as_kernels, choose_places, filters_of, patches, share_of, values
from ghostify.graph.op_queries import is_add

POSITIONS = 40_000
HELD_OUT = 4


@torch.no_grad()
def compensated(model: nn.Module, small: nn.Module, kept: dict[str, Tensor], batches: tuple[Tensor, ...]) -> nn.Module:
    """A copy of a pruned model whose convolutions and linear layers are fitted by least squares, on present inputs.

    The aim of each is what the original's makes on the same images, in the channels that are left (`kept`, by name);
    before a residual sum, also what the shortcut lacks. The ridge, towards the pruned filters, is chosen on every
    fourth batch, as ghostify's own is. Both networks run once, side by side, all batches at a time.
    """
    whole, less = fx.symbolic_trace(copy.deepcopy(model)), fx.symbolic_trace(copy.deepcopy(small))
    runs = _Run(whole, batches), _Run(less, batches)
    for node in whole.graph.nodes:
        runs[0].step(node)
        layer = less.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            channels = kept[str(node.target)]
            wanted = [y[:, channels] for y in runs[0].known[node.name]]
            for y, lack in zip(wanted, _lacks(node, runs, channels), strict=False):
                y += lack
            _refit(layer, runs[1].known[node.args[0].name], wanted)
        if isinstance(layer, nn.Linear):
            _refit(layer, runs[1].known[node.args[0].name], runs[0].known[node.name])
        runs[1].step(node)
        for run in runs:
            run.forget(node)
    result = copy.deepcopy(small)
    for name, module in less.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            result.set_submodule(name, module)
    return result.eval()


class _Run:
    """One network's values for all batches, by node."""

    def __init__(self, module: fx.GraphModule, batches: tuple[Tensor, ...]) -> None:
        self.module, self.batches, self.known = module.eval(), batches, {}
        self.ends = {last.name: node for node in module.graph.nodes for last in node.all_input_nodes}

    def step(self, node: fx.Node) -> None:
        self.known[node.name] = [self._made(node, k) for k in range(len(self.batches))]

    def _made(self, node: fx.Node, k: int) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.known[n.name][k])
        if node.op == "placeholder":
            return self.batches[k].clone()
        if node.op == "call_module":
            return self.module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return getattr(self.module, str(node.target))
        return args[0] if node.op == "output" else node.target(*args, **kwargs)

    def forget(self, node: fx.Node) -> None:
        """What no node behind this one reads."""
        for name in [n for n in self.known if n in self.ends and self.ends[n].name == node.name]:
            del self.known[name]


def _lacks(node: fx.Node, runs: tuple[_Run, _Run], channels: Tensor) -> list[Tensor]:
    """What the shortcut lacks to which this convolution's norm is added, as the norm's input; nothing where none is."""
    norm = _only(node)
    total = None if norm is None else _only(norm)
    if norm is None or total is None or norm.op != "call_module" or not is_add(total):
        return []
    module = runs[1].module.get_submodule(str(norm.target))
    shorts = [n.name for n in total.args if n is not norm]
    if not isinstance(module, nn.BatchNorm2d) or len(shorts) != 1 or shorts[0] not in runs[0].known:
        return []
    scale = module.weight / (module.running_var + module.eps).sqrt()
    scale = torch.where(scale.abs() < 1e-2 * scale.abs().mean(), torch.inf, scale)
    both = zip(*(run.known[shorts[0]] for run in runs), strict=True)
    return [(a[:, channels] - b) / scale[:, None, None] for a, b in both]


def _only(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _refit(layer: nn.Conv2d | nn.Linear, inputs: list[Tensor], wanted: list[Tensor]) -> None:
    prior = filters_of(layer) if isinstance(layer, nn.Conv2d) else layer.weight.detach().double()
    parts = [Moments.zero(prior.shape[1], len(prior)) for _ in range(2)]
    share = share_of(POSITIONS, sum(map(len, inputs)))
    for k, (x, y) in enumerate(zip(inputs, wanted, strict=True)):
        part = parts[k % HELD_OUT == HELD_OUT - 1]
        if isinstance(layer, nn.Conv2d):
            places = choose_places(y.shape, share, k)
            part.add(patches(layer, x, places), values(y, places))
        else:
            part.add(x, y)
    pair = Pair(*parts)
    both = pair.both
    filters = dense_prediction(pair, prior.T, torch.ones(len(prior), dtype=torch.float64), free_mean=True)
    weight = as_kernels(filters.T, layer) if isinstance(layer, nn.Conv2d) else filters.T
    layer.weight.copy_(weight)
    layer.bias = nn.Parameter((both.mean_y - both.mean_u @ filters).float())
