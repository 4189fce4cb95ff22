"""Channel order: which convolution takes up a permutation of another's channels, and the taking up."""

from __future__ import annotations

import torch
from torch import nn

from ghostify.graph.batchnorm import BatchNorm
from ghostify.modules.ghost import GhostModule
from ghostify.pruning.channel_groups import ChannelGroup, ChannelGroups
from ghostify.pruning.permutation import permute_readers


def find_permutation_target(module: nn.Module, groups: ChannelGroups, nodes: list[str]) -> ChannelGroup | None:
    """The group of a convolution's channels where one dense convolution, and norms, can take up their order."""
    numbers = groups.of_node.get(nodes[0], ()) if len(nodes) == 1 else ()
    group = groups.groups[numbers[0]] if len(numbers) == 1 else None
    if group is None or group.fixed is not None or len(group.producers) != 1 or len(group.consumers) != 1:
        return None
    holders = [module.get_submodule(member.path.rpartition(".")[0]) for member in group.parameters]
    consumer = module.get_submodule(group.consumers[0].path)
    reads_no_others = isinstance(consumer, nn.Conv2d) and consumer.in_channels == group.size
    return group if reads_no_others and all(isinstance(holder, BatchNorm) for holder in holders) else None


def push_permutation(module: nn.Module, ghost: GhostModule, group: ChannelGroup) -> None:
    """Drop `ghost`'s gather: permute the norms behind it and the inputs of the consuming convolution instead."""
    assert ghost.order is not None
    permute_readers(module, group, torch.argsort(ghost.order))
    ghost.order = None
