"""Weights that a module computes at each forward, such as by spectral norm, made plain parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ghostify.graph.modes import eval_mode


def has_computed_weights(module: nn.Module) -> bool:
    """Whether any part has a parametrization, or a hook of PyTorch's former weight norm or spectral norm."""
    return any(parametrize.is_parametrized(part) or any(_former_norms(part)) for part in module.modules())


@torch.no_grad()
def fix_computed_weights(module: nn.Module) -> None:
    """Replace computed weights by the parameters that they are in evaluation mode, in place."""
    for part in list(module.modules()):
        if parametrize.is_parametrized(part):
            _fix_parametrizations(part)
        for norm in list(_former_norms(part)):
            (remove_weight_norm if isinstance(norm, WeightNorm) else remove_spectral_norm)(part, norm.name)


def _fix_parametrizations(module: nn.Module) -> None:
    """As `parametrize.remove_parametrizations`, which breaks copies of the module: they share its class."""
    lists: Any = module.parametrizations
    with eval_mode(module):
        computed = {name: (getattr(module, name).clone(), list(lists[name].parameters())) for name in lists}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, (value, originals) in computed.items():
        if originals:
            is_trained = any(p.requires_grad for p in originals)
            module.register_parameter(name, nn.Parameter(value, is_trained))
        else:
            module.register_buffer(name, value)


def _former_norms(module: nn.Module) -> Iterator[WeightNorm | SpectralNorm]:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            yield hook
