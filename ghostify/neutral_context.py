"""The context of public functions: whatever modes and defaults the caller has set, they compute the same."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextlib.contextmanager
def neutral_context() -> Iterator[None]:
    """Gradients on, no inference mode, no autocast, float32 and the CPU as defaults, and random numbers of one seed.

    Afterwards all of it is as before, random states included. Modes belong to the thread. The default dtype and the
    random states belong to the process: the first of several threads inside sets them, the last one restores them.
    Deterministic algorithms and the number of threads, which changes the order of sums, stay those of the caller.
    """
    is_outermost = not hasattr(_thread, "caller")
    if is_outermost:
        _thread.caller = ThreadModes.current()
    try:
        with _process_defaults, ThreadModes().entered():
            yield
    finally:
        if is_outermost:
            del _thread.caller


@contextlib.contextmanager
def caller_modes() -> Iterator[None]:
    """The modes of the thread outside of the outermost `neutral_context`, for a function that the caller passed."""
    modes: ThreadModes = getattr(_thread, "caller", None) or ThreadModes.current()
    with modes.entered():
        yield


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restores the random states of Python, NumPy and PyTorch (CPU and CUDA)."""
    states = RandomStates.current()
    try:
        yield
    finally:
        states.restore()


@dataclass(frozen=True)
class ThreadModes:
    """PyTorch's modes of one thread, by default those of a new process; `autocast` holds dtypes by device type."""

    grad: bool = True
    inference: bool = False
    autocast: Mapping[str, torch.dtype] = field(default_factory=dict)
    default_device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls) -> ThreadModes:
        """The modes of this thread."""
        autocast = {d: torch.get_autocast_dtype(d) for d in AUTOCAST_DEVICES if torch.is_autocast_enabled(d)}
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, torch.get_default_device())

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """A context with these modes."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device in AUTOCAST_DEVICES:
                if torch.is_autocast_enabled(device) or device in self.autocast:
                    dtype = self.autocast.get(device)
                    stack.enter_context(torch.autocast(device, dtype, enabled=device in self.autocast))
            if torch.get_default_device() != self.default_device:
                stack.enter_context(self.default_device)
            yield


@dataclass(frozen=True, eq=False)
class RandomStates:
    """The states of the process's random number generators; those of CUDA only where it is initialized."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def current(cls) -> RandomStates:
        """The present states."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(), torch.default_generator.get_state(), cuda)

    def restore(self) -> None:
        """Make these the present states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.default_generator.set_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def seed_random_states(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch; those of CUDA only where it is initialized."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class _ProcessDefaults:
    """The default dtype and the random states while any thread is inside."""

    def __init__(self) -> None:
        self.lock, self.entries = threading.Lock(), 0
        self.dtype, self.states = torch.float32, RandomStates.current()

    def __enter__(self) -> None:
        with self.lock:
            if not self.entries:
                self.dtype, self.states = torch.get_default_dtype(), RandomStates.current()
                torch.set_default_dtype(torch.float32)
                seed_random_states(0)
            self.entries += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.entries -= 1
            if not self.entries:
                torch.set_default_dtype(self.dtype)
                self.states.restore()


_thread = threading.local()
_process_defaults = _ProcessDefaults()
