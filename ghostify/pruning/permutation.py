"""Permutation of a group's channels: the same values at other channel indices, by permuting weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ghostify.graph.paths import resolve_attribute
from ghostify.modules.ghost import GhostModule
from ghostify.pruning.channel_groups import ChannelGroup, Member


@torch.no_grad()
def permute_group(module: nn.Module, group: ChannelGroup, order: Tensor) -> None:
    """Permute the group's channels in place, in all its members: channel k is then what channel `order[k]` was."""
    for member in group.producers:
        _permute_outputs(module, member, order)
    permute_consumers(module, group, order)


@torch.no_grad()
def permute_consumers(module: nn.Module, group: ChannelGroup, order: Tensor) -> None:
    """Permute the parameters and consumers of a group whose producers compute the channels in `order` already."""
    for member in group.parameters:
        _permute_outputs(module, member, order)
    for member in group.consumers:
        _permute_inputs(module, member, order)


def _permute_outputs(module: nn.Module, member: Member, order: Tensor) -> None:
    target = resolve_attribute(module, member.path)
    for tensor in (target,) if isinstance(target, Tensor) else target.parameters(recurse=False):
        if tensor.dim():
            tensor.copy_(tensor[_index(len(tensor), member, order).to(tensor.device)])


def _permute_inputs(module: nn.Module, member: Member, order: Tensor) -> None:
    consumer = module.get_submodule(member.path)
    weight = (consumer.primary_conv if isinstance(consumer, GhostModule) else consumer).weight
    assert isinstance(weight, Tensor)
    channels = _index(weight.shape[1] // member.width, member, order)
    columns = channels[:, None] * member.width + torch.arange(member.width)
    weight.copy_(weight[:, columns.flatten().to(weight.device)])


def _index(size: int, member: Member, order: Tensor) -> Tensor:
    """The indices of `size` channels, of which those of the member are permuted."""
    index = torch.arange(size)
    index[member.start : member.start + len(order)] = member.start + order.cpu()
    return index
