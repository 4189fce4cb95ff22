"""Callbacks on module calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

BeforeCall = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
AfterCall = Callable[[nn.Module, Any], None]


def on_calls(
    modules: Iterable[nn.Module], *, before: BeforeCall | None = None, after: AfterCall | None = None
) -> contextlib.ExitStack:
    """Call `before(module, args, kwargs)` and `after(module, output)` at every call of the modules.

    The callbacks' results are ignored. As a context manager, the result removes the hooks on exit.
    """
    handles = contextlib.ExitStack()
    for module in modules:
        if before is not None:
            handles.enter_context(module.register_forward_pre_hook(_ignoring_result(before), with_kwargs=True))
        if after is not None:
            hook = _ignoring_result(after)
            handles.enter_context(module.register_forward_hook(lambda inner, _, output, hook=hook: hook(inner, output)))
    return handles


def _ignoring_result(callback: Callable[..., Any]) -> Callable[..., None]:
    """A hook that returns None: another result would replace the inputs or the output."""

    def hook(*args: Any) -> None:
        callback(*args)

    return hook
