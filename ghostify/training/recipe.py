"""The settings of a training run, each with its type and range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.optim import list_optimizers

from ghostify.arguments import a_choice, a_flag, a_number, a_seed, an_integer, optional
from ghostify.errors import GhostifyError
from ghostify.text import format_value

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")
LOOKAHEAD, MAX_COUNT = "lookahead_", 10**9


@dataclass(frozen=True)
class Recipe:
    """Training settings. Optimizers and schedules are timm's, by name; `batch` is the total over all processes.

    The loss is `distill` times the distillation loss of the outputs (`temperature` softens the classes), plus
    `features` times the relative error of the rewritten layers' maps, plus `labels` times the cross entropy. `clip`
    limits the norm of the gradients. `frozen_norms` keeps the running statistics of the norms. `precision` is "no",
    "bf16" or "fp16". The model is evaluated every `evaluate_every` epochs, and training ends after `patience`
    evaluations without a gain. The state is saved every `save_every` steps. `warmup` is a share of all steps. Raises
    `GhostifyError` for values of another type or outside their range.
    """

    epochs: float = 1.0
    batch: int = 128
    optimizer: str = "sgd"
    learning_rate: float = 0.02
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.1
    distill: float = 1.0
    temperature: float = 2.0
    features: float = 0.0
    labels: float = 0.0
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float | None = None
    clip: float | None = None
    frozen_norms: bool = False
    precision: str = "no"
    evaluate_every: float = 1.0
    patience: int | None = None
    save_every: int = 200
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for key, check in RECIPE_CHECKS.items():
            object.__setattr__(self, key, check(f"recipe: {key}", getattr(self, key)))
        if self.distill == self.features == self.labels == 0:
            raise GhostifyError("recipe: distill, features and labels are all 0. Set one of them above 0.")


def _an_optimizer(name: str, value: Any) -> str:
    """A name of timm's, also after "lookahead_"."""
    if isinstance(value, str) and value.lower().removeprefix(LOOKAHEAD) in list_optimizers():
        return value
    raise GhostifyError(f"{name} {format_value(value)}: is unknown. Use one of timm.optim.list_optimizers().")


_positive = a_number(0, above=True, problem="is not a positive number", remedy="Set it above 0.")
_at_least_0 = a_number(0, problem="is not a number of at least 0", remedy="Set it to 0 or more.")
_below_1 = a_number(0, 1, below=True, problem="is not a number of at least 0 and below 1", remedy="Set it to one.")
_count = an_integer(1, MAX_COUNT, problem=f"is not an integer from 1 to {MAX_COUNT:,}", remedy="Set it to one.")

RECIPE_CHECKS = {
    "epochs": a_number(
        0, MAX_COUNT, above=True, problem=f"is not a positive number of at most {MAX_COUNT:,}", remedy="Set it to one."
    ),
    "batch": _count,
    "optimizer": _an_optimizer,
    "learning_rate": _positive,
    "weight_decay": _at_least_0,
    "schedule": a_choice(SCHEDULES),
    "warmup": a_number(0, 1, problem="is not a number from 0 to 1", remedy="Set it to one."),
    "distill": _at_least_0,
    "temperature": _positive,
    "features": _at_least_0,
    "labels": _at_least_0,
    "smoothing": _below_1,
    "mixup": _at_least_0,
    "cutmix": _at_least_0,
    "ema": optional(_below_1),
    "clip": optional(_positive),
    "frozen_norms": a_flag,
    "precision": a_choice(("no", "bf16", "fp16")),
    "evaluate_every": _positive,
    "patience": optional(_count),
    "save_every": _count,
    "workers": an_integer(0, 1024, problem="is not an integer from 0 to 1,024", remedy="Set it to one."),
    "seed": a_seed,
}
