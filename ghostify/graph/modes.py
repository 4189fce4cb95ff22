"""Temporary evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ghostify.neutral_context import preserved_random_state


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module's mode and the random states are restored."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad(), preserved_random_state():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
