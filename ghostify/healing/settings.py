"""The settings of healing, each with its type and range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ghostify.arguments import a_choice, a_flag, a_number, an_integer, optional
from ghostify.errors import GhostifyError

PRECISIONS = ("auto", "fp32", "bf16")
MAX_COUNT = 10**9


@dataclass(frozen=True)
class Healing:
    """Gradient steps after the fit: at most `seconds` or `steps`, each on `batch` calibration images.

    `learning_rate` is relative to the size of the weights. With `augment`, images are cropped, mirrored and changed in
    brightness at random. `precision` "auto" computes in bfloat16 where the processor has instructions for it. With a
    limit in `steps` alone, the result does not depend on the speed of the machine. Raises `GhostifyError` for values of
    another type or outside their range, and without a limit.
    """

    seconds: float | None = None
    steps: int | None = None
    learning_rate: float = 2e-3
    batch: int = 32
    augment: bool = True
    precision: str = "auto"

    def __post_init__(self) -> None:
        for key, check in HEALING_CHECKS.items():
            object.__setattr__(self, key, check(f"heal: {key}", getattr(self, key)))
        if self.seconds is None and self.steps is None:
            raise GhostifyError("heal: has no limit. Set seconds, steps or both.")


def a_healing(name: str, value: Any) -> Healing:
    """Settings of healing, or a number of seconds; a check of arguments."""
    return value if isinstance(value, Healing) else Healing(seconds=_seconds(name, value))


_seconds = a_number(
    0, above=True, problem="is not a positive number of seconds", remedy="Use 600 for ten minutes, or a Healing."
)
_count = an_integer(1, MAX_COUNT, problem=f"is not an integer from 1 to {MAX_COUNT:,}", remedy="Set it to one.")

HEALING_CHECKS = {
    "seconds": optional(_seconds),
    "steps": optional(_count),
    "learning_rate": a_number(0, above=True, problem="is not a positive number", remedy="Set it above 0."),
    "batch": _count,
    "augment": a_flag,
    "precision": a_choice(PRECISIONS),
}
