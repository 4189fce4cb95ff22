"""The folder of a training run: its state, metrics and best weights, each written atomically."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ghostify.deprecation import with_new_keys
from ghostify.errors import GhostifyError
from ghostify.files import open_regular, parse_json, read_json, read_text
from ghostify.io.atomic import (
    check_output_folder,
    partial_folder,
    remove_own_files,
    staged_file,
    staged_folder,
    write_text_atomic,
)
from ghostify.io.lock import locked
from ghostify.io.manifest import changed_files
from ghostify.io.output import check_unicode, parents_created, writing_to
from ghostify.io.tensor_file import read_tensors
from ghostify.io.tensor_writer import write_tensors
from ghostify.records import from_json
from ghostify.text import first_line

SETTINGS, METRICS, PROGRESS = "training.json", "metrics.jsonl", "progress.json"
BEST, STATE, TENSORBOARD = "best.safetensors", "state-", "tensorboard"
PYTORCH_WRITERS = ("inline_container", "PytorchStreamWriter", "iostream")  # in messages about files it cannot write
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
    """The folder of one training run, written by the main process alone, and by no other run until it is closed.

    `settings` are the recipe, the number of images and the fingerprints of both models. Raises `GhostifyError` for a
    folder that belongs to another run, or that another process is training in.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, is_main: bool) -> None:
        self.folder, self.is_main, self.tensorboard = folder, is_main, None
        self.open_places = contextlib.ExitStack()
        if not is_main:
            return
        check_run_folder(folder)
        with writing_to(folder), self.open_places as stack:
            stack.enter_context(parents_created(folder / SETTINGS))
            stack.enter_context(locked(folder, lambda place: place.mkdir(exist_ok=True), folder))
            if (folder / SETTINGS).exists():
                stored = _read_object(folder / SETTINGS)
                changed = [key for key in settings if stored.get(key) != settings[key]]
                if changed:
                    raise GhostifyError(
                        f"{folder}: belongs to a run with different {', '.join(changed)}. {OTHER_FOLDER}"
                    )
            write_text_atomic(folder / SETTINGS, json.dumps(dict(settings), indent=1) + "\n")
            self.open_places = stack.pop_all()

    def resume(self, accelerator: Any) -> TrainingProgress:
        """Load the newest state, and remove the metrics that were logged after it.

        Raises `GhostifyError` for a state, or best weights, that are missing or damaged.
        """
        accelerator.wait_for_everyone()
        states = self._states()
        progress = TrainingProgress()
        if states:
            if self.is_main:
                check_output_folder(states[-1], overwrite=True)  # removes what a killed write of it left
            _check_state(states[-1])
            progress = _read_progress(states[-1] / PROGRESS)
            _load_state(accelerator, states[-1])
        if self.is_main:
            if progress.best is not None:
                self.load_best()
            metrics = self.folder / METRICS
            with writing_to(metrics):
                entries = metrics_of(self.folder) if metrics.exists() else []
                lines = [json.dumps(entry) + "\n" for entry in entries if entry["step"] <= progress.step]
                write_text_atomic(metrics, "".join(lines))
            self.tensorboard = _tensorboard_writer(self.folder, progress.step)
        return progress

    def save(self, accelerator: Any, progress: TrainingProgress) -> None:
        """Write the state of all processes; the previous state is removed afterwards."""
        state = self.folder / f"{STATE}{progress.step:09d}"
        staging = partial_folder(state)
        with staged_folder(state) if self.is_main else contextlib.nullcontext():
            accelerator.wait_for_everyone()
            with _pytorch_writing_to(state):
                accelerator.save_state(str(staging))
            accelerator.wait_for_everyone()
            if self.is_main:
                (staging / PROGRESS).write_text(json.dumps(asdict(progress)))
        if self.is_main:
            for previous in self._states()[:-1]:
                remove_own_files(previous)
        accelerator.wait_for_everyone()

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line to `metrics.jsonl`, and the same values to TensorBoard's log."""
        if not self.is_main:
            return
        file = self.folder / METRICS
        with writing_to(file), file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
        if self.tensorboard is not None:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)

    def save_best(self, weights: dict[str, Tensor]) -> None:
        """Replace the best weights."""
        if self.is_main:
            file = self.folder / BEST
            with writing_to(file), staged_file(file) as staging:
                write_tensors(staging, {name: value.contiguous().clone() for name, value in weights.items()})

    def load_best(self) -> dict[str, Tensor]:
        """The weights that were saved last as the best."""
        return read_tensors(self.folder / BEST, remedy=OTHER_FOLDER)

    def discard_start(self) -> None:
        """Remove what was written before the first state: nothing can resume from it."""
        if not self.is_main or self._states():
            return
        if self.tensorboard is not None:
            self.tensorboard.close()
        shutil.rmtree(self.folder / TENSORBOARD, ignore_errors=True)
        for name in (BEST, METRICS, SETTINGS):
            (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Flush TensorBoard's log, end its thread, and leave the folder to other processes."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        self.open_places.close()

    def _states(self) -> list[Path]:
        """The complete states, the newest last."""
        return sorted(p for p in self.folder.glob(f"{STATE}*") if re.fullmatch(rf"{STATE}\d{{9,}}", p.name))


def check_run_folder(folder: Path) -> None:
    """Raise `GhostifyError` for a folder that is not of a training run, is damaged or cannot be written to.

    So too for a name that is not Unicode.
    """
    check_unicode(folder)
    check_output_folder(folder, overwrite=True)
    with writing_to(folder):
        symlink = next((p for p in folder.iterdir() if p.is_symlink()), None) if folder.exists() else None
        if symlink is not None:  # a run writes to files by these names
            raise GhostifyError(f"{symlink}: is a link, and a run writes into its folder alone. {OTHER_FOLDER}")
        if (folder / SETTINGS).exists():
            _read_object(folder / SETTINGS)
        elif folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise GhostifyError(f"{folder}: holds files that are not of a training run. {OTHER_FOLDER}")


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """The complete lines of a run's `metrics.jsonl`; a killed process may have left a truncated one.

    Values that are not finite, which earlier versions wrote, are left out. Raises `GhostifyError` for lines that are
    not of a training run.
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
    return [{k: v for k, v in with_new_keys(entry, NEW_KEYS).items() if math.isfinite(v)} for entry in entries]


def _check_state(state: Path) -> None:
    """Raise `GhostifyError` for a state with changed files, or a pickle that holds more than tensors.

    Accelerate reads all files but those of other objects, such as averaged weights, without running code from them.
    """
    damaged = next(changed_files(state), None)
    if damaged is not None:
        raise GhostifyError(f"{state / damaged}: is missing or damaged. {OTHER_FOLDER}")
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


def _load_state(accelerator: Any, state: Path) -> None:
    """Load a checked state; raises `GhostifyError` for one of another model or optimizer."""
    try:
        accelerator.load_state(str(state))
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise GhostifyError(f"{state}: cannot be loaded ({first_line(error)}). {OTHER_FOLDER}") from error


@contextlib.contextmanager
def _pytorch_writing_to(state: Path) -> Iterator[None]:
    """Errors of a full disk, which PyTorch and safetensors raise as their own, as one `GhostifyError`."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in PYTORCH_WRITERS):
            raise
        raise GhostifyError(
            f"{state}: cannot be written. Check the free space, and run the same again to resume."
        ) from error


def _read_progress(file: Path) -> TrainingProgress:
    try:
        return from_json(TrainingProgress, _read_object(file), "progress")
    except GhostifyError as error:
        raise GhostifyError(f"{file}: {error}. {OTHER_FOLDER}") from error


def _read_object(file: Path) -> dict[str, Any]:
    content = read_json(file, folder=file.parent, remedy=OTHER_FOLDER)
    if not isinstance(content, dict):
        raise GhostifyError(f"{file}: is not a file of a training run. {OTHER_FOLDER}")
    return with_new_keys(content, NEW_KEYS)


def _tensorboard_writer(folder: Path, step: int) -> Any:
    """A writer that drops what was logged after `step`, or None where TensorBoard is not installed."""
    try:
        writer_class = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        return None
    return writer_class(str(folder / TENSORBOARD), purge_step=step)
