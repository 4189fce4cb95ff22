"""One process of the fuzzer: changes a folder, reads it under the watch, and says what became of it."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ghostify import GhostifyError, deploy, load, report, save
from ghostify.cli.loading import load_pair
from ghostify.reporting.table import report_table
from tests.fuzz_mutations import write_case
from tests.fuzz_samples import Sample, read_samples
from tests.fuzz_watch import Watch

SECONDS, FORWARD_SECONDS, WAITING = 5.0, 2.0, 6  # for each step, and for a forward; see `time_limit`
MEMORY = 3 * 2**30  # bytes beyond those that a worker needs at first
WEIGHTS = {"torchvision": 1, "timm": 2, "old-timm-test-resnet": 2}  # of samples, of which the small ones are frequent
USUAL_WEIGHT = 8


class LateError(BaseException):
    """A step takes too long; no handler of errors takes it for one."""


class FindingError(Exception):
    """What must not happen."""


class Worker:
    """Runs cases under the watch, which stays in this process for good."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.seed = Path(tempfile.mkdtemp(prefix="worker-", dir=place)), seed
        self.samples = read_samples(place / "samples")
        self.watch = Watch()
        warnings.simplefilter("ignore")
        with self.watch.off():
            str(torch.zeros(2))  # as in messages of torch's errors
            for sample in self.samples:  # imports what the steps import the first time
                model = self._load(sample, sample.folder)
                assert self._forward(model, sample, sample.folder) == "loaded"
                self._save(model, sample.folder, self.place / "warm-up")
                assert self._deploy(model, sample, sample.folder)
                self._build_original(sample.folder)
        _limit_memory()

    def run(self, index: int, *, verbose: bool = False) -> dict[str, Any]:
        """The kind of a case, its outcome, and what must not happen and did, or an empty text."""
        rng = random.Random(f"{self.seed} {index}")
        sample = rng.choices(self.samples, [WEIGHTS.get(sample.name, USUAL_WEIGHT) for sample in self.samples])[0]
        home = Path(tempfile.mkdtemp(prefix="case-", dir=self.place))
        case, out, here = home / "case", home / "out", home / "here"
        out.mkdir()
        here.mkdir()
        kind = write_case(sample, case, rng)
        os.chdir(here)
        self.watch.events.clear()
        before = _entries(self.place)
        outcome, problems = "finding", []
        try:
            outcome = self._outcome(sample, case, out)
        except BaseException as error:
            if verbose:
                traceback.print_exc()
            problems.append(f"{type(error).__name__}: {error}")
        appeared = (_entries(self.place) - before) | _entries(here)
        problems += [*self.watch.events, *(f"wrote {name}" for name in sorted(appeared))]
        os.chdir(self.place)
        shutil.rmtree(home)
        problem = f"{sample.name}: {'; '.join(problems)[:2000]}" if problems else ""
        return {"index": index, "kind": kind, "outcome": "finding" if problems else outcome, "problem": problem}

    def _outcome(self, sample: Sample, case: Path, out: Path) -> str:
        """The outcome of a case; raises `FindingError`, or any other error that must not occur."""
        try:
            model = self._load(sample, case)
        except GhostifyError as error:
            if not str(error).isprintable() or len(str(error)) > 2500 or str(case) not in str(error):
                raise FindingError(f"a message such as {error}") from error
            return "refused"
        outcome = self._forward(model, sample, case)
        try:
            self._save(model, case, out)
        except GhostifyError:
            outcome += " and not saved again"
        else:
            try:
                self._load(sample, out)
            except GhostifyError as error:
                raise FindingError(f"saved again, but {error}") from error
        self._build_original(case)
        return (
            outcome if outcome != "loaded" or self._deploy(model, sample, case) else "loaded without an inference form"
        )

    def _load(self, sample: Sample, folder: Path) -> nn.Module:
        with time_limit(SECONDS), self.watch.over(readable=folder):
            model = load(folder, allow=sample.allow)
            Console(file=io.StringIO()).print(report_table(report(model)))
        return model

    def _forward(self, model: nn.Module, sample: Sample, folder: Path) -> str:
        inputs = [x.clone() for x in sample.inputs]
        try:
            with time_limit(FORWARD_SECONDS), torch.no_grad(), self.watch.over(readable=folder):
                model(*inputs)
        except LateError:
            return "loaded with a long forward"
        except Exception:
            return "loaded with a failing forward"
        return "loaded"

    def _deploy(self, model: nn.Module, sample: Sample, folder: Path) -> bool:
        """Whether the model has an inference form; its outputs may differ, where a folder replaced the weights."""
        try:
            with time_limit(2 * SECONDS), self.watch.over(readable=folder):
                deploy(model, tuple(sample.inputs))
        except GhostifyError:
            return False
        return True

    def _save(self, model: nn.Module, folder: Path, out: Path) -> None:
        with time_limit(SECONDS), self.watch.over(readable=folder, writable=out.parent):
            save(model, out)

    def _build_original(self, folder: Path) -> None:
        """Read the source of a folder as the command does; a refusal is one line."""
        try:
            with time_limit(SECONDS), self.watch.over(readable=folder):
                load_pair(folder, None, None)
        except GhostifyError as error:
            if not str(error).isprintable():
                raise FindingError(f"a message such as {error}") from error


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `LateError` after so many seconds of the processor, or `WAITING` times as many of the clock.

    What other processes take on a busy machine does not count.
    """

    def late(*_: Any) -> None:
        raise LateError(f"over {seconds:g} s")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, WAITING * seconds))
    previous = [signal.signal(number, late) for number, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, previous, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def _limit_memory() -> None:
    """Let this process have no more than `MEMORY` beyond what it has; more raises `MemoryError`."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _entries(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)}


def main(place: str, *numbers: str) -> None:
    """Run every `step`-th case from `start` on; a JSON line before and after each says so."""
    seed, start, count, step = map(int, numbers)
    faulthandler.enable()
    worker = Worker(Path(place), seed)
    for index in range(start, count, step):
        print(json.dumps({"start": index}), flush=True)
        print(json.dumps(worker.run(index)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
