"""The paper's nonlinear form: the norm and activation behind a convolution, for ghosts that read through them."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, fx, nn

from ghostify.graph.op_queries import activation_module
from ghostify.planning.planner import GhostRewrite
from ghostify.pruning.slicing import slice_norm

Copied = TypeVar("Copied", bound=nn.Module)


def copy_activation_chain(module: fx.GraphModule, entry: GhostRewrite) -> nn.Sequential:
    """Copies of the norm, if any, and the activation of all n maps of `entry`; neither writes in place."""
    node = next(n for n in module.graph.nodes if n.name == entry.activation)
    line = [] if entry.norm is None else [module.get_submodule(entry.norm)]
    if str(node.target) != entry.norm:
        activation = activation_module(module, node)
        assert activation is not None
        line.append(activation)
    return without_inplace(nn.Sequential(*line))


def without_inplace(module: Copied) -> Copied:
    """A copy that leaves what it reads as it is."""
    copied = copy.deepcopy(module)
    for inner in copied.modules():
        if hasattr(inner, "inplace"):
            setattr(inner, "inplace", False)  # noqa: B010
    return copied


def slice_chain(line: nn.Sequential, channels: Tensor) -> nn.Sequential:
    """A copy of the line for some `channels` only, in their order."""
    return slice_norm(line, channels)
