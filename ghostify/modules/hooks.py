"""Hooks of a module: what runs around its forward and backward."""

from __future__ import annotations

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module itself, or the backward through it, does more than its forward says."""
    return any(getattr(module, hooks) for hooks in HOOKS)
