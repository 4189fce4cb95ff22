"""Reads thousands of changed folders under a watch: each is refused in one line, or loads and does nothing but compute.

    python -m tests.fuzz_folders --count 20000 --seed 0 --jobs 2 [--output counts.json]
    python -m tests.fuzz_folders --seed 0 --only 1234        # one case again, with its traceback

A case is its seed and index. Findings are printed as they come, and the run then ends with exit code 1: an event that
the watch forbids, an exception other than `GhostifyError` from `load`, `save`, `report` or the reading of the source,
a message that is not one line, a model that is saved but not loaded again, a crash, a file that appears, a step that
takes too long or too much memory. A forward may end in an error, and take its time: a folder may hold a model that
computes nonsense.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # seconds for one case before its process is killed
Counts = Counter[tuple[str, str]]  # of cases by kind of change and outcome


@dataclass
class Run:
    """All cases of a seed, in several processes, and what became of them."""

    place: Path
    seed: int
    count: int
    jobs: int
    counts: Counts = field(default_factory=Counter)
    findings: int = 0

    def finish(self) -> None:
        """Run all cases; a process that ends or hangs is replaced, and its case is a finding."""
        with ThreadPoolExecutor(self.jobs) as threads:
            list(threads.map(self._run_share, range(self.jobs)))

    def _run_share(self, start: int) -> None:
        while start < self.count:
            start = self._run_process(start)

    def _run_process(self, start: int) -> int:
        """Run cases from `start` on until the process ends; returns the case to go on with."""
        numbers = [str(n) for n in (self.seed, start, self.count, self.jobs)]
        environment = {**os.environ, "HOME": str(self.place), "TORCH_HOME": str(self.place), "OMP_NUM_THREADS": "1"}
        current, alarm = None, threading.Timer(0, lambda: None)
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz_worker", str(self.place), *numbers],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line)
                alarm.cancel()
                if "start" in message:
                    current = message["start"]
                    alarm = threading.Timer(PATIENCE, process.kill)
                    alarm.start()
                else:
                    self._add(**message)
                    current, start = None, message["index"] + self.jobs
            alarm.cancel()
            code = process.wait()
            errors.seek(0)
            end = f"its process ended with {code}: {errors.read()[-1500:]!r}"
        if current is not None:
            self._add(current, "any", "finding", end)
            return current + self.jobs
        if code:
            raise SystemExit(end)
        return start

    def _add(self, index: int, kind: str, outcome: str, problem: str) -> None:
        self.counts[kind, outcome] += 1
        if problem:
            self.findings += 1
            print(f"finding: --seed {self.seed} --only {index}: {kind}: {problem}", flush=True)


def table(counts: Counts) -> str:
    """The counts of a run as text: a row for each kind of change, a column for each outcome."""
    kinds, outcomes = (sorted({key[place] for key in counts}) for place in (0, 1))
    rows = [["change", *outcomes, "all"]]
    for kind in kinds:
        row = [counts[kind, outcome] for outcome in outcomes]
        rows.append([kind, *map(str, (*row, sum(row)))])
    sums = [sum(counts[kind, outcome] for kind in kinds) for outcome in outcomes]
    rows.append(["all", *map(str, (*sums, sum(sums)))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def as_json(run: Run) -> str:
    """The seed, the number of cases and of findings, and the counts of a run."""
    counts = {kind: {o: n for (k, o), n in sorted(run.counts.items()) if k == kind} for kind, _ in sorted(run.counts)}
    return json.dumps({"seed": run.seed, "count": run.count, "findings": run.findings, "counts": counts}, indent=1)


def summary(run: Mapping[str, Any]) -> str:
    """The content of `as_json` in one line: the number of folders with each outcome."""
    outcomes: Counter[str] = Counter()
    for row in run["counts"].values():
        outcomes.update(row)
    listed = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common() if outcome != "finding")
    return f"{run['count']:,} changed folders: {listed}; {run['findings']} findings"


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    parser.add_argument("--only", type=int, help="run one case, with its traceback")
    parser.add_argument("--samples", help="names of samples, separated by commas (default: all)")
    options = parser.parse_args()
    from tests.fuzz_samples import write_samples  # late: `--help` needs no torch

    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        place = Path(name).resolve()
        (place / "samples").mkdir()
        write_samples(place / "samples", options.samples.split(",") if options.samples else None)
        if options.only is not None:
            from tests.fuzz_worker import Worker  # late: its watch stays in the process

            result = Worker(place, options.seed).run(options.only, verbose=True)
            print(json.dumps(result, indent=1))
            os.chdir("/")
            return int(bool(result["problem"]))
        run = Run(place, options.seed, options.count, options.jobs)
        run.finish()
    print(table(run.counts))
    if options.output is not None:
        options.output.write_text(as_json(run) + "\n")
    print(summary(json.loads(as_json(run))))
    return int(run.findings > 0)


if __name__ == "__main__":
    sys.exit(main())
