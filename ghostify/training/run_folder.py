"""What a training leaves on disk: its state, its metrics and its best weights, each whole or not there."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ghostify.errors import GhostifyError
from ghostify.io.atomic import staged_folder, write_text_atomic

FACTS, METRICS, BEST, STATE, PROGRESS = "training.json", "metrics.jsonl", "best.safetensors", "state-", "progress.json"


@dataclass(frozen=True)
class TrainingProgress:
    """Steps done, the best score so far with its distance to the original, and evaluations since without a gain."""

    step: int = 0
    best: float | None = None
    distance_to_original: float = 0.0
    evaluations_without_gain: int = 0


class RunFolder:
    """A folder of one training, written by the main process; raises `GhostifyError` if it is another's."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], main: bool) -> None:
        self.folder, self.main, self.board = folder, main, None
        file = folder / FACTS
        if not main:
            return
        if file.exists():
            known = json.loads(file.read_text())
            other = [key for key in facts if known.get(key) != facts[key]]
            if other:
                raise GhostifyError(f"{folder}: holds a training of other {', '.join(other)}: use another folder")
        elif folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise GhostifyError(f"{folder}: holds something else than a training: use another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, json.dumps(dict(facts), indent=1) + "\n")

    def resume(self, accelerator: Any) -> TrainingProgress:
        """Load the newest whole state, and forget what was noted after it."""
        accelerator.wait_for_everyone()
        states = sorted(self.folder.glob(f"{STATE}*[0-9]"))
        progress = TrainingProgress()
        if states:
            accelerator.load_state(str(states[-1]))
            progress = TrainingProgress(**json.loads((states[-1] / PROGRESS).read_text()))
        if self.main:
            metrics = self.folder / METRICS
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            write_text_atomic(metrics, "".join(f"{line}\n" for line in lines if _step(line) <= progress.step))
            self.board = _board(self.folder, progress.step)
        return progress

    def save(self, accelerator: Any, progress: TrainingProgress) -> None:
        """Keep the state of all that takes part; the one before goes when this one stands."""
        fresh, place = self.folder / f".{STATE}", self.folder / f"{STATE}{progress.step:09d}"
        with staged_folder(place, staging=fresh) if self.main else nullcontext():
            accelerator.wait_for_everyone()
            accelerator.save_state(str(fresh))
            accelerator.wait_for_everyone()
            if self.main:
                (fresh / PROGRESS).write_text(json.dumps(asdict(progress)))
        if self.main:
            for old in sorted(self.folder.glob(f"{STATE}*[0-9]"))[:-1]:
                shutil.rmtree(old, ignore_errors=True)
        accelerator.wait_for_everyone()

    def log_metrics(self, step: int, found: Mapping[str, float]) -> None:
        """Add a line of metrics."""
        if not self.main:
            return
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps({"step": step, **found}) + "\n")
        if self.board is not None:
            for key, value in found.items():
                self.board.add_scalar(key, value, step)

    def save_best(self, weights: dict[str, Tensor]) -> None:
        """Keep the best weights."""
        if self.main:
            fresh = self.folder / f".{BEST}"
            save_file({name: value.contiguous().clone() for name, value in weights.items()}, fresh)
            fresh.replace(self.folder / BEST)

    def close(self) -> None:
        """Write out what TensorBoard is still to get; its thread ends."""
        if self.board is not None:
            self.board.close()

    def best(self) -> dict[str, Tensor]:
        """The weights that were kept last."""
        return load_file(self.folder / BEST)


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics of a training."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def _step(line: str) -> float:
    """The step of a line of metrics; one that a kill cut short is of none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _board(folder: Path, step: int) -> Any:
    try:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        return None
    return writer(str(folder / "tensorboard"), purge_step=step)
