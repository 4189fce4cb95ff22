"""Parts of a forward that set the gradient mode or autocast, which a graph does not contain."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import PreDispatchTorchFunctionMode


class ExecutionRegions(PreDispatchTorchFunctionMode):  # autocast reports to this class of modes only
    """While active, records whether the running code is within such a part.

    The code runs as by default: with gradients, without autocast and outside inference mode.
    """

    def __init__(self) -> None:
        self.autocast_depth = 0

    def is_default(self) -> bool:
        """Whether the running code is outside all such parts."""
        return torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not self.autocast_depth

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _enter_autocast:
            self.autocast_depth += 1
        elif func is _exit_autocast:
            self.autocast_depth -= 1
        elif func is torch._C._set_grad_enabled and (args[0] is True and torch.is_grad_enabled()):
            raise TypeError("it enables gradients")
        elif func is torch._C._set_grad_enabled and not isinstance(args[0], bool):
            raise TypeError("its gradient mode is not constant")
        else:
            return func(*args, **(kwargs or {}))
        return None


@contextlib.contextmanager
def recorded_regions() -> Iterator[ExecutionRegions]:
    """Record the regions of the code that runs in this context; afterwards the modes are as they were."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        ExecutionRegions() as regions,
    ):
        yield regions
