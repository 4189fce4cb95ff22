"""What is known of a model's maps without images: mean and variance of each channel, from BatchNorm on.

BatchNorm's outputs have mean beta and variance gamma^2; activations are followed as of normal values, sums as of
independent ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.tracing.program import called
from ghostify.tracing.wiring import NORMS, activation_of, adds, is_silent

POOLS = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample)
NODES = 64


@dataclass(frozen=True, eq=False)
class Channels:
    """Mean and variance of each channel (n, float64)."""

    mean: Tensor
    var: Tensor


Known = dict[fx.Node, "Channels | None"]


def input_channels(module: fx.GraphModule) -> dict[str, Channels]:
    """What is known of the channels that each node of a graph reads first, by node."""
    known: Known = {}
    for node in module.graph.nodes:
        known[node] = _channels(module, known, node)
    firsts = {n.name: known[n.all_input_nodes[0]] for n in module.graph.nodes if n.all_input_nodes}
    return {name: channels for name, channels in firsts.items() if channels is not None}


def _channels(module: fx.GraphModule, known: Known, node: fx.Node) -> Channels | None:
    sources = node.all_input_nodes
    if node.op == "call_module" and isinstance(called(module, node), NORMS):
        return _normed(called(module, node))
    if not sources:
        return None
    if node.target is torch.cat or adds(node):
        parts = [known[source] for source in sources]
        found = [p for p in parts if p is not None]
        if len(found) < len(parts):
            return None
        if node.target is torch.cat:
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            joined = Channels(torch.cat([p.mean for p in found]), torch.cat([p.var for p in found]))
            return joined if dim == 1 else None
        if len(found) == 2 and found[0].mean.shape == found[1].mean.shape:
            return Channels(found[0].mean + found[1].mean, found[0].var + found[1].var)
        return None
    if (activation := activation_of(module, node)) is not None:
        source = known[sources[0]]
        return None if source is None else activated(activation, source)
    if is_silent(module, node) or (node.op == "call_module" and isinstance(called(module, node), POOLS)):
        return known[sources[0]]
    return None


def activated(activation: nn.Module, source: Channels) -> Channels:
    """Mean and variance of normal values behind an activation, by quadrature at NODES points."""
    places = torch.linspace(-4, 4, NODES, dtype=torch.float64)
    weights = torch.exp(-places.square() / 2)
    weights = weights / weights.sum()
    with torch.no_grad():
        values = activation((source.mean + places[:, None] * source.var.sqrt()).clone())
    mean = (weights[:, None] * values).sum(0)
    return Channels(mean, (weights[:, None] * (values - mean).square()).sum(0))


def _normed(norm: Any) -> Channels:
    gamma = torch.ones(norm.num_features) if norm.weight is None else norm.weight.detach()
    beta = torch.zeros(norm.num_features) if norm.bias is None else norm.bias.detach()
    made = Channels(beta.double().cpu(), gamma.double().cpu().square())
    for child in (c for c in norm.children() if not isinstance(c, nn.Identity)):
        made = activated(child, made)
    return made
