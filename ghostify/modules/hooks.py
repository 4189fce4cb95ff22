"""Hooks of a module, which run around its forward and backward."""

from __future__ import annotations

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOK_OPTIONS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def has_hooks(module: nn.Module) -> bool:
    """Whether the module itself has forward or backward hooks; those of its submodules do not count."""
    return any(getattr(module, hooks) for hooks in HOOKS)


def has_state_dict_hooks(module: nn.Module) -> bool:
    """Whether the module itself has hooks that run when a state dict is made or loaded."""
    return any(getattr(module, hooks, None) for hooks in STATE_DICT_HOOKS)


def copy_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the forward and backward hooks of `source`, in place."""
    for name in (*HOOKS, *HOOK_OPTIONS):
        vars(target)[name] = vars(source)[name].copy()
    vars(target)["_is_full_backward_hook"] = vars(source)["_is_full_backward_hook"]
