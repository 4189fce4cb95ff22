"""A module in the form in which it can be saved: plain weights, and no hooks that its library installs by itself."""

from __future__ import annotations

from torch import nn

from ghostify.graph.model_copy import copy_module
from ghostify.graph.parametrizations import fix_computed_weights, has_computed_weights

# Modules that hook the modules of a model when it first runs, with the attribute by which they know that they have
SELF_INSTALLED = {"transformers.utils.output_capturing": "_output_capturing_hooks_installed"}


def savable(module: nn.Module) -> nn.Module:
    """The module; a copy where weights are computed, or where a library has installed hooks that it installs again."""
    if not has_computed_weights(module) and not _self_installed_hooks(module):
        return module
    copied = copy_module(module)
    fix_computed_weights(copied)
    for part, key in _self_installed_hooks(copied):
        del part._forward_hooks[key]
    for part in copied.modules():
        for attribute in SELF_INSTALLED.values():
            vars(part).pop(attribute, None)
    return copied


def _self_installed_hooks(module: nn.Module) -> list[tuple[nn.Module, int]]:
    return [
        (part, key)
        for part in module.modules()
        for key, hook in part._forward_hooks.items()
        if getattr(hook, "__module__", None) in SELF_INSTALLED
    ]
