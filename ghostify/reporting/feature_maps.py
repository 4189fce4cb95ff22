"""The output maps of one layer on images, in the original's channel order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.errors import GhostifyError
from ghostify.graph.batches import bind_batch
from ghostify.graph.call_hooks import on_calls
from ghostify.graph.inputs import call_model
from ghostify.graph.modes import eval_mode
from ghostify.modules.ghost import GhostModule
from ghostify.numerics import relative_squared_error

MIN_VARIANCE = 1e-12


def layer_outputs(module: nn.Module, layer: str, batches: Sequence[Any]) -> Tensor:
    """The outputs of the submodule `layer` on all images, N x n x H x W on the CPU.

    Raises `GhostifyError` for a layer that is not called.
    """
    outputs: list[Tensor] = []
    hooks = on_calls(
        [module.get_submodule(layer)], after=lambda _, output: outputs.append(output.detach().float().cpu())
    )
    with hooks, eval_mode(module):
        for batch in batches:
            call_model(module, bind_batch(module, batch))
    if not outputs:
        raise GhostifyError(f"{layer}: does not run on these images. Choose a layer that the model calls.")
    return torch.cat(outputs)


def ghost_outputs(module: nn.Module, layer: str, batches: Sequence[Any], channels: Sequence[int]) -> Tensor:
    """The same for a converted model, whose ghost module computes the original's `channels` in this order."""
    outputs = layer_outputs(module, layer, batches)
    ghost = module.get_submodule(layer)
    is_permuted = isinstance(ghost, GhostModule) and ghost.order is None
    return outputs[:, torch.argsort(torch.tensor(channels))] if is_permuted else outputs


def map_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of each map by the variance of its target, without constant differences (n)."""
    count = targets[:, 0].numel()
    return relative_squared_error(
        outputs, targets, over=(0, 2, 3), ignore_mean=True, per_map=True, minimum=MIN_VARIANCE * count
    )
