"""Callbacks on the calls of modules."""

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
    """Have `before(module, args, kwargs)` and `after(module, output)` called at every call of the modules.

    Neither changes what the modules do. As a context, the result removes the hooks when it is left.
    """
    handles = contextlib.ExitStack()
    for module in modules:
        if before is not None:
            hook = _ignoring_result(before)
            handles.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        if after is not None:
            tell = _ignoring_result(after)
            handles.enter_context(module.register_forward_hook(lambda inner, _, output, tell=tell: tell(inner, output)))
    return handles


def _ignoring_result(callback: Callable[..., Any]) -> Callable[..., None]:
    """A hook that returns something would replace the inputs or the output."""

    def hook(*args: Any) -> None:
        callback(*args)

    return hook
