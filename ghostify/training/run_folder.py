"""The folder of a training run: its state, metrics and best weights, each written atomically."""

from __future__ import annotations

import contextlib
import importlib
import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ghostify.errors import GhostifyError
from ghostify.files import open_regular, parse_json, read_json, read_text
from ghostify.io.atomic import staged_folder, write_text_atomic
from ghostify.io.tensor_file import read_tensors

SETTINGS, METRICS, PROGRESS = "training.json", "metrics.jsonl", "progress.json"
BEST, STATE = "best.safetensors", "state-"
OTHER_OBJECTS = "custom_checkpoint"  # Accelerate's name for the files of registered objects
NEW_KEYS = {"apart": "distance_to_original", "stale": "evaluations_without_gain"}  # by the key in earlier versions
OTHER_FOLDER = "Use another folder."


@dataclass(frozen=True)
class TrainingProgress:
    """Steps done, the best score so far with its distance to the original, and evaluations since without a gain."""

    step: int = 0
    best: float | None = None
    distance_to_original: float = 0.0
    evaluations_without_gain: int = 0


class RunFolder:
    """The folder of one training run, written by the main process alone.

    `settings` are the recipe, the number of images and the fingerprints of both models. Raises `GhostifyError` for a
    folder that belongs to another run.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, is_main: bool) -> None:
        self.folder, self.is_main, self.tensorboard = folder, is_main, None
        file = folder / SETTINGS
        if not is_main:
            return
        if file.exists():
            stored = _read_object(file)
            changed = [key for key in settings if stored.get(key) != settings[key]]
            if changed:
                raise GhostifyError(f"{folder}: belongs to a run with different {', '.join(changed)}. {OTHER_FOLDER}")
        elif folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise GhostifyError(f"{folder}: holds files that are not of a training run. {OTHER_FOLDER}")
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, json.dumps(dict(settings), indent=1) + "\n")

    def resume(self, accelerator: Any) -> TrainingProgress:
        """Load the newest state, and remove the metrics that were logged after it."""
        accelerator.wait_for_everyone()
        states = self._states()
        progress = TrainingProgress()
        if states:
            _check_state(states[-1])
            accelerator.load_state(str(states[-1]))
            progress = _read_progress(states[-1] / PROGRESS)
        if self.is_main:
            metrics = self.folder / METRICS
            entries = metrics_of(self.folder) if metrics.exists() else []
            lines = [json.dumps(entry) + "\n" for entry in entries if entry["step"] <= progress.step]
            write_text_atomic(metrics, "".join(lines))
            self.tensorboard = _tensorboard_writer(self.folder, progress.step)
        return progress

    def save(self, accelerator: Any, progress: TrainingProgress) -> None:
        """Write the state of all processes; the previous state is removed afterwards."""
        staging, state = self.folder / f".{STATE}", self.folder / f"{STATE}{progress.step:09d}"
        with staged_folder(state, staging=staging) if self.is_main else contextlib.nullcontext():
            accelerator.wait_for_everyone()
            accelerator.save_state(str(staging))
            accelerator.wait_for_everyone()
            if self.is_main:
                (staging / PROGRESS).write_text(json.dumps(asdict(progress)))
        if self.is_main:
            for previous in self._states()[:-1]:
                shutil.rmtree(previous, ignore_errors=True)
        accelerator.wait_for_everyone()

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line to `metrics.jsonl`, and the same values to TensorBoard's log."""
        if not self.is_main:
            return
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.tensorboard is not None:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)

    def save_best(self, weights: dict[str, Tensor]) -> None:
        """Replace the best weights."""
        if self.is_main:
            staging = self.folder / f".{BEST}"
            save_file({name: value.contiguous().clone() for name, value in weights.items()}, staging)
            staging.replace(self.folder / BEST)

    def load_best(self) -> dict[str, Tensor]:
        """The weights that were saved last as the best."""
        return read_tensors(self.folder / BEST, remedy=OTHER_FOLDER)

    def close(self) -> None:
        """Flush TensorBoard's log and end its thread."""
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _states(self) -> list[Path]:
        """The complete states, the newest last."""
        return sorted(self.folder.glob(f"{STATE}*[0-9]"))


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """The complete lines of a run's `metrics.jsonl`; a killed process may have left a truncated one.

    Raises `GhostifyError` for lines that are not of a training run.
    """
    file = folder / METRICS
    entries = []
    for line in read_text(file, folder=folder, remedy=OTHER_FOLDER).splitlines():
        with contextlib.suppress(ValueError):
            entries.append(parse_json(line, finite=False))
    for entry in entries:
        if not isinstance(entry, dict) or not all(
            isinstance(v, int | float) for v in (entry.get("step"), *entry.values())
        ):
            raise GhostifyError(f"{file}: has a line that is not of a training run. {OTHER_FOLDER}")
    return [_with_new_keys(entry) for entry in entries]


def _check_state(state: Path) -> None:
    """Raise `GhostifyError` for a state with other than regular files, or a pickle that holds more than tensors.

    Accelerate reads all files but those of other objects, such as averaged weights, without running code from them.
    """
    for file in sorted(p for p in state.rglob("*") if not p.is_dir()):
        with open_regular(file, folder=state, remedy=OTHER_FOLDER) as stream:
            if not file.name.startswith(OTHER_OBJECTS):
                continue
            try:
                torch.load(stream, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
                raise GhostifyError(
                    f"{file}: is damaged, or cannot be read without running code from it. {OTHER_FOLDER}"
                ) from error


def _read_progress(file: Path) -> TrainingProgress:
    try:
        progress = TrainingProgress(**_read_object(file))
    except TypeError as error:
        raise GhostifyError(f"{file}: has keys that this version does not know ({error}). {OTHER_FOLDER}") from error
    counts = (progress.step, progress.evaluations_without_gain)
    scores = (progress.best or 0.0, progress.distance_to_original)
    if not all(type(n) is int and n >= 0 for n in counts) or not all(isinstance(n, int | float) for n in scores):
        raise GhostifyError(f"{file}: has other values than a training run writes. {OTHER_FOLDER}")
    return progress


def _read_object(file: Path) -> dict[str, Any]:
    content = read_json(file, folder=file.parent, remedy=OTHER_FOLDER)
    if not isinstance(content, dict):
        raise GhostifyError(f"{file}: is not a file of a training run. {OTHER_FOLDER}")
    return _with_new_keys(content)


def _with_new_keys(item: Mapping[str, Any]) -> dict[str, Any]:
    return {NEW_KEYS.get(key, key): value for key, value in item.items()}


def _tensorboard_writer(folder: Path, step: int) -> Any:
    """A writer that drops what was logged after `step`, or None where TensorBoard is not installed."""
    try:
        writer_class = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        return None
    return writer_class(str(folder / "tensorboard"), purge_step=step)
