"""Permutation targets: convolutions whose inputs can be permuted in place of the preceding ghost module's outputs."""

from __future__ import annotations

import torch
from torch import nn

from ghostify.graph.batchnorm import BatchNorm
from ghostify.modules.ghost import GhostModule
from ghostify.pruning.channel_groups import ChannelGroup, ChannelGroups
from ghostify.pruning.permutation import permute_consumers


def find_permutation_target(module: nn.Module, groups: ChannelGroups, nodes: list[str]) -> ChannelGroup | None:
    """The group of a convolution's output channels if only BatchNorms and one standard convolution have to be permuted
    with it, None otherwise; `nodes` are the names of the nodes that call the convolution."""
    indices = groups.of_node.get(nodes[0], ()) if len(nodes) == 1 else ()
    group = groups.groups[indices[0]] if len(indices) == 1 else None
    if group is None or group.order_obstacle is not None or len(group.producers) != 1 or len(group.consumers) != 1:
        return None
    owners = [module.get_submodule(member.path.rpartition(".")[0]) for member in group.parameters]
    consumer = module.get_submodule(group.consumers[0].path)
    reads_no_others = isinstance(consumer, nn.Conv2d) and consumer.in_channels == group.size
    return group if reads_no_others and all(isinstance(owner, BatchNorm) for owner in owners) else None


def push_permutation(module: nn.Module, ghost: GhostModule, group: ChannelGroup) -> None:
    """Permute the norms that follow `ghost` and the inputs of the consuming convolution, and drop `ghost.order`."""
    assert ghost.order is not None
    permute_consumers(module, group, torch.argsort(ghost.order))
    ghost.order = None
