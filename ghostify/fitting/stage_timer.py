"""Where the seconds go."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class StageTimer:
    """Seconds by the name of what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time inside the `with` block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def time_items(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items; counts the time that they take to arrive, not what the caller does with them."""
        arriving = iter(items)
        while True:
            with self(name):
                try:
                    item = next(arriving)
                except StopIteration:
                    return
            yield item
