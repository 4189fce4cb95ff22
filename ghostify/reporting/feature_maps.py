"""What one layer of a model makes of images, in the original's channel order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.errors import GhostifyError
from ghostify.graph.call_hooks import on_calls
from ghostify.graph.inputs import bind_batch, call_model
from ghostify.graph.modes import eval_mode
from ghostify.modules.ghost import GhostModule
from ghostify.numerics import relative_squared_error

MIN_VARIANCE = 1e-12


def layer_outputs(module: nn.Module, layer: str, batches: Sequence[Any]) -> Tensor:
    """What the module called `layer` makes of all images, N x n x H x W on the CPU; `GhostifyError` if nothing."""
    kept: list[Tensor] = []
    hooks = on_calls([module.get_submodule(layer)], after=lambda _, made: kept.append(made.detach().float().cpu()))
    with hooks, eval_mode(module):
        for batch in batches:
            call_model(module, bind_batch(module, batch))
    if not kept:
        raise GhostifyError(f"{layer}: does not run on these images")
    return torch.cat(kept)


def ghost_outputs(module: nn.Module, layer: str, batches: Sequence[Any], channels: Sequence[int]) -> Tensor:
    """The same of a converted model, whose ghost module computes the original's `channels` in this order."""
    made = layer_outputs(module, layer, batches)
    ghost = module.get_submodule(layer)
    absorbed = isinstance(ghost, GhostModule) and ghost.order is None
    return made[:, torch.argsort(torch.tensor(channels))] if absorbed else made


def errors_of(made: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of each map by the variance of the wanted one, constants apart (n)."""
    count = wanted[:, 0].numel()
    return relative_squared_error(
        made, wanted, over=(0, 2, 3), ignore_mean=True, per_map=True, minimum=MIN_VARIANCE * count
    )
