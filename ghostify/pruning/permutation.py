"""A new order for the channels of a group: the same values in other places, by permuting weights."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

from ghostify.modules.ghost import GhostModule
from ghostify.pruning.channel_groups import ChannelGroup, Member


@torch.no_grad()
def permute_group(module: nn.Module, group: ChannelGroup, order: Tensor) -> None:
    """Let everybody make and read the group's channels in `order`, in place: the k-th is then what was `order[k]`."""
    for member in group.producers:
        _permute_made(module, member, order)
    permute_readers(module, group, order)


@torch.no_grad()
def permute_readers(module: nn.Module, group: ChannelGroup, order: Tensor) -> None:
    """The same for parameters and consumers only, where what makes the channels is in that order already."""
    for member in group.parameters:
        _permute_made(module, member, order)
    for member in group.consumers:
        _permute_read(module, member, order)


def _permute_made(module: nn.Module, member: Member, order: Tensor) -> None:
    found = operator.attrgetter(member.path)(module)
    for tensor in (found,) if isinstance(found, Tensor) else found.parameters(recurse=False):
        if tensor.dim():
            tensor.copy_(tensor[_index(len(tensor), member, order).to(tensor.device)])


def _permute_read(module: nn.Module, member: Member, order: Tensor) -> None:
    found = module.get_submodule(member.path)
    weight = (found.primary_conv if isinstance(found, GhostModule) else found).weight
    assert isinstance(weight, Tensor)
    channels = _index(weight.shape[1] // member.width, member, order)
    columns = channels[:, None] * member.width + torch.arange(member.width)
    weight.copy_(weight[:, columns.flatten().to(weight.device)])


def _index(size: int, member: Member, order: Tensor) -> Tensor:
    """The places of `size` channels, of which those of the member are permuted."""
    index = torch.arange(size)
    index[member.start : member.start + len(order)] = member.start + order.cpu()
    return index
