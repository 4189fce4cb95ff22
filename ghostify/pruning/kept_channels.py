"""What is left of modules and tensors once groups lose channels, and the taking out."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ghostify.pruning.channel_groups import ChannelGroup
from ghostify.pruning.slicing import slice_conv, slice_linear, slice_tensor


@dataclass(frozen=True)
class KeptChannels:
    """The outputs, or entries of a tensor, and the inputs that are left; None where all are.

    `tensors` names what else a plan has lose channels together with a convolution, and the entries left of it.
    """

    kept_out: tuple[int, ...] | None = None
    kept_in: tuple[int, ...] | None = None
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()


def kept_by_path(module: nn.Module, kept: Mapping[ChannelGroup, Sequence[int]]) -> dict[str, KeptChannels]:
    """What is left of every member of groups that keep some of their channels, by its path in `module`.

    A member of several groups loses channels of all of them.
    """
    lost_out, lost_in = defaultdict[str, set[int]](set), defaultdict[str, set[int]](set)
    for group, own in kept.items():
        lost = set(range(group.size)) - set(own)
        for member in (*group.producers, *group.parameters):
            lost_out[member.path] |= {member.start + k for k in lost}
        for member in group.consumers:
            width = member.width
            lost_in[member.path] |= {(member.start + k) * width + j for k in lost for j in range(width)}
    paths = dict.fromkeys((*lost_out, *lost_in))
    sizes = {path: _sizes(operator.attrgetter(path)(module)) for path in paths}
    return {
        path: KeptChannels(_left(made, lost_out.get(path)), _left(read, lost_in.get(path)))
        for path, (made, read) in sizes.items()
    }


def prune_channels(module: nn.Module, kept: Mapping[str, KeptChannels]) -> None:
    """Leave out channels of the modules and tensors at these paths, in place; what is left keeps its weights."""
    for path, own in kept.items():
        found = operator.attrgetter(path)(module)
        if isinstance(found, nn.Conv2d):
            module.set_submodule(path, slice_conv(found, own.kept_out, own.kept_in))
        elif isinstance(found, nn.Linear):
            module.set_submodule(path, slice_linear(found, own.kept_out, own.kept_in))
        elif own.kept_out is not None:
            owner, _, leaf = path.rpartition(".")
            slice_tensor(module.get_submodule(owner), leaf, own.kept_out)


def _sizes(found: Tensor | nn.Module) -> tuple[int, int]:
    """How many outputs, or entries, and inputs there are."""
    if isinstance(found, nn.Conv2d):
        return found.out_channels, found.in_channels
    if isinstance(found, nn.Linear):
        return found.out_features, found.in_features
    assert isinstance(found, Tensor)
    return len(found), 0


def _left(size: int, lost: set[int] | None) -> tuple[int, ...] | None:
    return None if lost is None else tuple(k for k in range(size) if k not in lost)
