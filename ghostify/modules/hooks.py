"""Hooks of a module, which run around its forward and backward."""

from __future__ import annotations

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether the module itself has forward or backward hooks; those of its submodules do not count."""
    return any(getattr(module, hooks) for hooks in HOOKS)
