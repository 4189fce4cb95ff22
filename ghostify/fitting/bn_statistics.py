"""What is known of a model's maps without images: mean and variance of each channel, from BatchNorm on.

BatchNorm's outputs have mean beta and variance gamma^2; activations are followed as of normal values, sums as of
independent ones.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ghostify.graph.batchnorm import BatchNorm, batchnorm_of, gamma_beta, inner_modules
from ghostify.graph.op_queries import (
    activation_input,
    activation_module,
    concat_inputs,
    elementwise_operands,
    is_add,
    is_identity_in_eval,
    is_resampling,
)

QUADRATURE_POINTS = 64


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Mean and variance of each channel (n, float64)."""

    mean: Tensor
    var: Tensor


Known = dict[fx.Node, "ChannelStats | None"]


def input_channel_stats(module: fx.GraphModule) -> dict[str, ChannelStats]:
    """What is known of the channels that each node of a graph reads first, by node."""
    known: Known = {}
    for node in module.graph.nodes:
        known[node] = _channels(module, known, node)
    firsts = {n.name: known[n.all_input_nodes[0]] for n in module.graph.nodes if n.all_input_nodes}
    return {name: channels for name, channels in firsts.items() if channels is not None}


def _channels(module: fx.GraphModule, known: Known, node: fx.Node) -> ChannelStats | None:
    if (norm := batchnorm_of(module, node)) is not None:
        return _batchnorm_stats(norm)
    if (joined := concat_inputs(node)) is not None:
        parts = [p for n in joined if (p := known[n]) is not None]
        if len(parts) < len(joined):
            return None
        return ChannelStats(torch.cat([p.mean for p in parts]), torch.cat([p.var for p in parts]))
    if is_add(node):
        one, other = (known[n] for n in elementwise_operands(node) or ())
        if one is None or other is None or one.mean.shape != other.mean.shape:
            return None
        return ChannelStats(one.mean + other.mean, one.var + other.var)
    if (activation := activation_module(module, node)) is not None:
        source = known[activation_input(module, node)]
        return None if source is None else activation_stats(activation, source)
    if is_identity_in_eval(module, node) or is_resampling(module, node):
        return known[node.all_input_nodes[0]]
    return None


def activation_stats(activation: nn.Module, source: ChannelStats) -> ChannelStats:
    """Mean and variance of normal values behind an activation, by quadrature at NODES points."""
    places = torch.linspace(-4, 4, QUADRATURE_POINTS, dtype=torch.float64)
    weights = torch.exp(-places.square() / 2)
    weights = weights / weights.sum()
    with torch.no_grad():
        alike = copy.deepcopy(activation).to("cpu", torch.float64)
        values = alike((source.mean + places[:, None] * source.var.sqrt()).clone())
    mean = (weights[:, None] * values).sum(0)
    return ChannelStats(mean, (weights[:, None] * (values - mean).square()).sum(0))


def _batchnorm_stats(norm: BatchNorm) -> ChannelStats:
    gamma, beta = gamma_beta(norm)
    made = ChannelStats(beta.double().cpu(), gamma.double().cpu().square())
    for child in inner_modules(norm).values():
        made = activation_stats(child, made)
    return made
