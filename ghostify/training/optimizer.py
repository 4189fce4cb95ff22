"""The optimizer and the schedule of a recipe."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from ghostify.errors import GhostifyError
from ghostify.text import first_line
from ghostify.training.recipe import Recipe


def optimizer_and_schedule(student: nn.Module, recipe: Recipe, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """timm's; raises `GhostifyError` for those that this machine or this version of timm does not have."""
    try:
        optimizer = create_optimizer_v2(
            student, recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise GhostifyError(
            f"recipe: optimizer {recipe.optimizer!r}: cannot be used here ({first_line(error)}). Use another."
        ) from error
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            recipe.schedule,
            num_epochs=steps,
            warmup_epochs=int(recipe.warmup * steps),
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=1,
        )
    except (AssertionError, ValueError) as error:
        raise GhostifyError(
            f"recipe: schedule {recipe.schedule!r}: does not suit {steps} steps ({first_line(error)}). Use cosine."
        ) from error
    if schedule is None:
        raise GhostifyError(f"recipe: schedule {recipe.schedule!r}: is not in this version of timm. Use cosine.")
    return optimizer, schedule
