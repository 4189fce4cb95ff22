"""Reads thousands of changed folders under a watch: each is refused in one line, or loads and does nothing but compute.

    python -m tests.fuzz_folders --count 20000 --seed 0 --jobs 2 [--output counts.json]
    python -m tests.fuzz_folders --seed 0 --only 1234        # one case again, with its traceback

A case is its seed and index. Findings are printed as they come, and the run then ends with exit code 1: an event that
the watch forbids, an exception other than `GhostifyError` from `load`, `save`, `report` or the reading of the source,
a message that is not one line, a crash, a file that appeared, a case of more than `SECONDS`, more than `MEMORY` bytes.
A forward may end in an error, and take its time: a folder may hold a model that computes nonsense.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS, FORWARD_SECONDS, PATIENCE = 5.0, 2.0, 30.0  # for reading, for a forward, and before a worker is killed
MEMORY = 3 * 2**30
WEIGHTS = {"torchvision": 1, "timm": 2, "old-timm-test-resnet": 2}  # of samples, of which the small ones are frequent
USUAL_WEIGHT = 8


class LateError(BaseException):
    """A case takes too long; no handler of errors takes it for one."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `LateError` in the main thread after so many seconds."""

    def late(*_: Any) -> None:
        raise LateError(f"over {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Worker:
    """Runs cases, one after the other, and prints a JSON line before and after each."""

    def __init__(self, place: Path, seed: int) -> None:
        from tests import fuzz_mutations, fuzz_samples, fuzz_watch  # late: the parent process needs none of them

        self.place, self.seed = place, seed
        self.samples = fuzz_samples.read_samples(place / "samples")
        self.write_case = fuzz_mutations.write_case
        self.watch = fuzz_watch.Watch()
        with self.watch.off():
            _warm_up()
            for sample in self.samples:
                self.warm_up(sample, place / "warm-up")
        soft = _virtual_memory() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (soft, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def run(self, index: int, *, verbose: bool = False) -> tuple[str, str, str]:
        """The kind of a case, its outcome, and the findings as text, empty where there are none."""
        rng = random.Random(f"{self.seed} {index}")
        weights = [WEIGHTS.get(sample.name, USUAL_WEIGHT) for sample in self.samples]
        sample = rng.choices(self.samples, weights)[0]
        home = Path(tempfile.mkdtemp(prefix="case-", dir=self.place))
        case, out = home / "case", home / "out"
        kind = f"{self.write_case(sample, case, rng)}"
        (home / "work").mkdir()
        out.mkdir()
        os.chdir(home / "work")
        self.watch.events.clear()
        before = _entries(self.place)
        try:
            outcome, problem = self._outcome(sample, case, out)
        except BaseException as error:
            if verbose:
                traceback.print_exc()
            outcome, problem = "finding", f"{type(error).__name__}: {error}"
        problems = [*([problem] if problem else []), *self.watch.events]
        appeared = (_entries(self.place) - before) | _entries(home / "work")
        problems += [f"wrote {name}" for name in sorted(appeared)]
        os.chdir(self.place)
        shutil.rmtree(home)
        return (
            kind,
            "finding" if problems else outcome,
            f"{sample.name}: {'; '.join(problems)[:2000]}" if problems else "",
        )

    def _outcome(self, sample: Any, case: Path, out: Path) -> tuple[str, str]:
        """The outcome of a case, and a problem or an empty text."""
        from ghostify import GhostifyError

        with time_limit(SECONDS):
            try:
                model = self._load(sample, case)
            except GhostifyError as error:
                return "refused", "" if _is_line_about(case, str(error)) else f"a message such as {str(error)[:300]!r}"
        outcome = self._forward(model, sample, case)
        with time_limit(SECONDS):
            try:
                self._save(model, case, out)
            except GhostifyError as error:
                return f"{outcome}, not saved again", "" if _is_line(
                    str(error)
                ) else f"a message such as {error!r:.300}"
        with time_limit(SECONDS):
            self._read_source(case)
        return outcome, ""

    def warm_up(self, sample: Any, out: Path) -> None:
        """All steps of a case with an unchanged folder, which must not fail; imports what they import."""
        model = self._load(sample, sample.folder)
        assert self._forward(model, sample, sample.folder) == "loaded"
        self._save(model, sample.folder, out)
        self._read_source(sample.folder)

    def _load(self, sample: Any, folder: Path) -> Any:
        from ghostify import load, report

        with self.watch.over(readable=folder):
            model = load(folder, allow=sample.allow)
            str(report(model))
            return model

    def _forward(self, model: Any, sample: Any, folder: Path) -> str:
        import torch

        inputs = [x.clone() for x in sample.inputs]
        try:
            with time_limit(FORWARD_SECONDS), torch.no_grad(), self.watch.over(readable=folder):
                model(*inputs)
        except LateError:
            return "loaded, forward takes long"
        except Exception:
            return "loaded, forward fails"
        return "loaded"

    def _save(self, model: Any, folder: Path, out: Path) -> None:
        from ghostify import save

        with self.watch.over(readable=folder, writable=out):
            save(model, out / "saved")

    def _read_source(self, folder: Path) -> None:
        """Build the original that a folder names, as the command does."""
        from ghostify import GhostifyError
        from ghostify.cli.loading import load_pair

        with contextlib.suppress(GhostifyError), self.watch.over(readable=folder):
            load_pair(folder, None, None)


def _is_line(message: str) -> bool:
    return message.isprintable() and 0 < len(message) < 2_500


def _is_line_about(folder: Path, message: str) -> bool:
    return _is_line(message) and str(folder) in message


def _warm_up() -> None:
    """Import what errors and warnings import the first time."""
    import linecache  # noqa: F401
    import warnings

    import torch

    with contextlib.suppress(Exception):
        torch.zeros(2) @ torch.zeros(3)
    warnings.simplefilter("ignore")


def _virtual_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _entries(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)}


def work(place: Path, seed: int, start: int, count: int, step: int) -> None:
    """Run every `step`-th case and print what becomes of it."""
    faulthandler.enable()
    worker = Worker(place, seed)
    for index in range(start, count, step):
        print(json.dumps({"start": index}), flush=True)
        kind, outcome, problem = worker.run(index)
        print(json.dumps({"index": index, "kind": kind, "outcome": outcome, "problem": problem}), flush=True)


@dataclass
class Run:
    """The counts of a run, and its workers."""

    place: Path
    seed: int
    count: int
    jobs: int
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: int = 0

    def start(self, number: int, start: int) -> _Process:
        arguments = [str(self.place), str(self.seed), str(start), str(self.count), str(self.jobs)]
        environment = {**os.environ, "HOME": str(self.place), "TORCH_HOME": str(self.place), "OMP_NUM_THREADS": "1"}
        errors = (self.place / f"errors-{number}").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz_folders", "--work", *arguments],
            stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
        )  # fmt: skip
        errors.close()
        return _Process(process, number, start)

    def add(self, kind: str, outcome: str, problem: str, index: int) -> None:
        self.counts[kind, outcome] += 1
        if problem:
            self.findings += 1
            print(f"finding: --seed {self.seed} --only {index}: {kind}: {problem}", flush=True)

    def finish(self) -> None:
        """Run all cases; a worker that ends or hangs is replaced, and its case is a finding."""
        selector = selectors.DefaultSelector()
        for number in range(self.jobs):
            self._register(selector, self.start(number, number))
        while selector.get_map():
            for key, _ in selector.select(timeout=1.0):
                process = key.data
                line = process.popen.stdout.readline()
                if line:
                    self._take(process, json.loads(line))
                else:
                    self._replace(
                        selector, process, f"ended with {process.popen.wait()}{process.last_words(self.place)}"
                    )
            for key in list(selector.get_map().values()):
                process = key.data
                if process.current is not None and time.monotonic() - process.since > PATIENCE:
                    process.popen.kill()
                    self._replace(selector, process, f"hangs for {PATIENCE:g} s")

    def _register(self, selector: selectors.BaseSelector, process: _Process) -> None:
        selector.register(process.popen.stdout, selectors.EVENT_READ, process)  # type: ignore[arg-type]

    def _take(self, process: _Process, line: dict[str, Any]) -> None:
        if "start" in line:
            process.current, process.since = line["start"], time.monotonic()
            return
        self.add(line["kind"], line["outcome"], line["problem"], line["index"])
        process.current, process.next = None, line["index"] + self.jobs

    def _replace(self, selector: selectors.BaseSelector, process: _Process, problem: str) -> None:
        selector.unregister(process.popen.stdout)  # type: ignore[arg-type]
        process.popen.wait()
        if process.next >= self.count and process.current is None:
            return
        if process.current is None:
            raise SystemExit(f"a worker {problem} before its first case")
        self.add("worker", "finding", problem, process.current)
        if process.current + self.jobs < self.count:
            self._register(selector, self.start(process.number, process.current + self.jobs))


class _Process:
    """A worker process and the case that it is at."""

    def __init__(self, popen: subprocess.Popen[str], number: int, start: int) -> None:
        self.popen, self.number, self.next = popen, number, start
        self.current: int | None = None
        self.since = time.monotonic()

    def last_words(self, place: Path) -> str:
        return f": {(place / f'errors-{self.number}').read_text()[-1500:]!r}"


def table(counts: Counter[tuple[str, str]]) -> str:
    """The counts of a run as text: a row for each kind of change, a column for each outcome."""
    kinds = sorted({kind for kind, _ in counts})
    outcomes = sorted({outcome for _, outcome in counts})
    rows = [["change", *outcomes, "all"]]
    rows += [
        [kind, *(str(counts[kind, o]) for o in outcomes), str(sum(counts[kind, o] for o in outcomes))] for kind in kinds
    ]
    rows.append(["all", *(str(sum(counts[k, o] for k in kinds)) for o in outcomes), str(sum(counts.values()))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    parser.add_argument("--only", type=int, help="run one case, with its traceback")
    parser.add_argument("--samples", help="names of samples, separated by commas (default: all)")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        place, *numbers = options.work
        work(Path(place), *map(int, numbers))
        return 0
    from tests.fuzz_samples import write_samples

    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        place = Path(name).resolve()
        (place / "samples").mkdir()
        write_samples(place / "samples", options.samples.split(",") if options.samples else None)
        if options.only is not None:
            kind, outcome, problem = Worker(place, options.seed).run(options.only, verbose=True)
            print(f"{kind}: {outcome}: {problem}")
            return int(bool(problem))
        run = Run(place, options.seed, options.count, options.jobs)
        run.finish()
    print(table(run.counts))
    if options.output is not None:
        counts = {
            kind: {o: n for (k, o), n in sorted(run.counts.items()) if k == kind} for kind, _ in sorted(run.counts)
        }
        content = {"seed": run.seed, "count": run.count, "findings": run.findings, "counts": counts}
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{run.count} changed folders, {run.findings} findings")
    return int(run.findings > 0)


if __name__ == "__main__":
    sys.exit(main())
