"""The settings of a training run."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from timm.optim import list_optimizers

from ghostify.errors import GhostifyError

PRECISIONS = ("no", "bf16", "fp16")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau")
MAX_COUNT, MAX_SEED = 10**9, 2**63 - 1


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
        for key, kind in typing.get_type_hints(Recipe).items():
            value = getattr(self, key)
            if not _is_of_type(value, kind):
                raise GhostifyError(f"recipe: {key} {value!r:.60}: is not {_describe_type(kind)}. Pass such a value.")
            if value is not None and key in RANGES and not RANGES[key][0](value):
                raise GhostifyError(f"recipe: {key} {value!r:.60}: is not {RANGES[key][1]}. Pass such a value.")
        if self.distill == self.features == self.labels == 0:
            raise GhostifyError("recipe: distill, features and labels are all 0. Set one of them above 0.")


def _is_of_type(value: object, kind: Any) -> bool:
    """Whether a value is of one of the types; whole numbers are numbers, booleans are not."""
    types = typing.get_args(kind) or (kind,)
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, (*types, int) if float in types else types)


def _describe_type(kind: Any) -> str:
    words = {float: "a number", int: "a whole number", str: "text", bool: "true or false", NoneType: "null (None)"}
    return " or ".join(words[t] for t in typing.get_args(kind) or (kind,))


def _is_optimizer(name: str) -> bool:
    return name.lower().removeprefix("lookahead_") in list_optimizers()


_POSITIVE = (lambda v: 0 < v < float("inf"), "a positive number")
_AT_LEAST_0 = (lambda v: 0 <= v < float("inf"), "a number of at least 0")
_COUNT = (lambda v: 1 <= v <= MAX_COUNT, f"between 1 and {MAX_COUNT:,}")
_SHARE = (lambda v: 0 <= v <= 1, "between 0 and 1")
RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda v: 0 < v <= MAX_COUNT, f"a positive number of at most {MAX_COUNT:,}"),
    "batch": _COUNT,
    "optimizer": (_is_optimizer, "an optimizer of timm (timm.optim.list_optimizers() lists them)"),
    "learning_rate": _POSITIVE,
    "weight_decay": _AT_LEAST_0,
    "schedule": (lambda v: v in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    "warmup": _SHARE,
    "distill": _AT_LEAST_0,
    "temperature": _POSITIVE,
    "features": _AT_LEAST_0,
    "labels": _AT_LEAST_0,
    "smoothing": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "mixup": _AT_LEAST_0,
    "cutmix": _AT_LEAST_0,
    "ema": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "clip": _POSITIVE,
    "precision": (lambda v: v in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "evaluate_every": _POSITIVE,
    "patience": _COUNT,
    "save_every": _COUNT,
    "workers": (lambda v: 0 <= v <= 1024, "between 0 and 1,024"),
    "seed": (lambda v: 0 <= v <= MAX_SEED, f"between 0 and {MAX_SEED}"),
}
