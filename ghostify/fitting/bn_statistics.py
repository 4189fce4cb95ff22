"""Mean and variance of each channel of a model's maps without images, propagated from BatchNorm.

BatchNorm's outputs have mean beta and variance gamma^2. Activations are applied to normal values, and sums are taken as
sums of independent values.
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


StatsByNode = dict[fx.Node, "ChannelStats | None"]


def input_channel_stats(module: fx.GraphModule) -> dict[str, ChannelStats]:
    """Statistics of the channels of each node's first input, by node name, where they are known."""
    stats: StatsByNode = {}
    for node in module.graph.nodes:
        stats[node] = _output_stats(module, stats, node)
    first_inputs = {n.name: stats[n.all_input_nodes[0]] for n in module.graph.nodes if n.all_input_nodes}
    return {name: channels for name, channels in first_inputs.items() if channels is not None}


def _output_stats(module: fx.GraphModule, stats: StatsByNode, node: fx.Node) -> ChannelStats | None:
    if (norm := batchnorm_of(module, node)) is not None:
        return _batchnorm_stats(norm)
    if (inputs := concat_inputs(node)) is not None:
        known = [s for n in inputs if (s := stats[n]) is not None]
        if len(known) < len(inputs):
            return None
        return ChannelStats(torch.cat([s.mean for s in known]), torch.cat([s.var for s in known]))
    if is_add(node):
        left, right = (stats[n] for n in elementwise_operands(node) or ())
        if left is None or right is None or left.mean.shape != right.mean.shape:
            return None
        return ChannelStats(left.mean + right.mean, left.var + right.var)
    if (activation := activation_module(module, node)) is not None:
        source = stats[activation_input(module, node)]
        return None if source is None else activation_stats(activation, source)
    if is_identity_in_eval(module, node) or is_resampling(module, node):
        return stats[node.all_input_nodes[0]]
    return None


def activation_stats(activation: nn.Module, source: ChannelStats) -> ChannelStats:
    """Mean and variance of an activation of normal values, by quadrature at QUADRATURE_POINTS points."""
    points = torch.linspace(-4, 4, QUADRATURE_POINTS, dtype=torch.float64)
    weights = torch.exp(-points.square() / 2)
    weights = weights / weights.sum()
    with torch.no_grad():
        double = copy.deepcopy(activation).to("cpu", torch.float64)
        values = double((source.mean + points[:, None] * source.var.sqrt()).clone())
    mean = (weights[:, None] * values).sum(0)
    return ChannelStats(mean, (weights[:, None] * (values - mean).square()).sum(0))


def _batchnorm_stats(norm: BatchNorm) -> ChannelStats:
    gamma, beta = gamma_beta(norm)
    stats = ChannelStats(beta.double().cpu(), gamma.double().cpu().square())
    for child in inner_modules(norm).values():
        stats = activation_stats(child, stats)
    return stats
