"""Copies of the norm and activation that follow a convolution, for ghosts that read activated maps as in the paper."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, fx, nn

from ghostify.graph.op_queries import activation_module
from ghostify.planning.planner import GhostRewrite
from ghostify.pruning.slicing import slice_norm

Copied = TypeVar("Copied", bound=nn.Module)


def copy_activation_chain(module: fx.GraphModule, entry: GhostRewrite) -> nn.Sequential:
    """Copies of the following norm, if any, and activation of all n maps of `entry`, without in-place operations."""
    node = next(n for n in module.graph.nodes if n.name == entry.activation)
    chain = [] if entry.norm is None else [module.get_submodule(entry.norm)]
    if str(node.target) != entry.norm:
        activation = activation_module(module, node)
        assert activation is not None
        chain.append(activation)
    return without_inplace(nn.Sequential(*chain))


def without_inplace(module: Copied) -> Copied:
    """A copy that does not change its inputs."""
    copied = copy.deepcopy(module)
    for inner in copied.modules():
        if hasattr(inner, "inplace"):
            setattr(inner, "inplace", False)  # noqa: B010
    return copied


def slice_chain(chain: nn.Sequential, channels: Tensor) -> nn.Sequential:
    """A copy of the chain for these `channels`, in their order."""
    return slice_norm(chain, channels)
