"""Temporary evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ghostify.graph.module_state import ModuleState
from ghostify.neutral_context import preserved_random_state


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the models are as they were.

    Restores every module's mode, and what forwards changed: attributes, hooks and the contents of buffers. Restores
    the random states.
    """
    states = [ModuleState(model) for model in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad(), preserved_random_state():
            yield
    finally:
        for state in states:
            state.restore()
