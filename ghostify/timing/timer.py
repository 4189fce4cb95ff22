"""Milliseconds of inference forms in a runtime, by turns: PyTorch's here, others in a process of their own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from ghostify.deployment.exporter import write_unchecked
from ghostify.errors import GhostifyError
from ghostify.evaluation import metrics
from ghostify.graph.inputs import as_arguments, tensor_leaves
from ghostify.runtimes.registry import (
    Runtime,
    check_supported,
    get_runtime,
    installed_version,
    load_runner,
    require_runtime,
)
from ghostify.runtimes.tensors import to_channels_last

ROUNDS = 15
INPUTS = "inputs.npz"


class LatencyTimer:
    """A context in which inference forms are timed in one runtime, with the present number of threads.

    "eager" runs in this process, on the device of the example; all others on the CPU, in a process that lives as long
    as the context, so that no runtime's threads disturb another's. `version` is part of the keys of measured latencies.
    """

    def __init__(self, runtime: str = "eager") -> None:
        self.runtime: Runtime = require_runtime(runtime)
        self.version = f"{self.runtime.name} {installed_version(self.runtime)}"
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> LatencyTimer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            stop_worker(self.process)
            self.process = None

    def latencies_ms(self, small: Sequence[nn.Module], examples: Sequence[Any], rounds: int = ROUNDS) -> list[float]:
        """Median milliseconds of one forward of each inference form (see `deploy`) on its example, by turns."""
        for example in examples:
            check_supported(self.runtime, example)
        if self.runtime.is_in_process:
            return metrics.interleaved_latency_ms(small, [_laid_out(x, self.runtime) for x in examples], rounds=rounds)
        with tempfile.TemporaryDirectory() as folder:
            both = enumerate(zip(small, examples, strict=True))
            files = [export_for_timing(m, self.runtime.name, x, Path(folder) / str(k)) for k, (m, x) in both]
            if self.process is None:
                self.process = start_worker(self.runtime.name, torch.get_num_threads())
            return [statistics.median(own) for own in request_timings(self.process, files, rounds)]


def export_for_timing(small: nn.Module, runtime: str, example: Any, folder: Path) -> Path:
    """Write an inference form, and the example inputs beside it, for a process of `start_worker`; returns the file."""
    chosen, (args, _) = get_runtime(runtime), as_arguments(example)
    check_supported(chosen, example)
    folder.mkdir(parents=True)
    np.savez(folder / INPUTS, *[x.numpy() for x in tensor_leaves(args)])
    return write_unchecked(small, args, folder, chosen, for_timing=True)


def start_worker(runtime: str, threads: int) -> subprocess.Popen[str]:
    """A process that times stored inference forms in one runtime, on lines of standard input."""
    command = [sys.executable, "-m", "ghostify.timing.timer", runtime, str(threads)]
    pipe, path = subprocess.PIPE, os.pathsep.join(p for p in sys.path if p)
    surroundings = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=surroundings)


def request_timings(process: subprocess.Popen[str], files: Sequence[Path], rounds: int) -> list[list[float]]:
    """Milliseconds of every turn of each stored form; one that was asked for before stays open."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps({"files": [str(f) for f in files], "rounds": rounds}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:
        line = ""
    answer: dict[str, Any] = json.loads(line) if line else {"error": f"its process ended ({process.wait()})"}
    if "error" in answer:
        raise GhostifyError(f"{files[0].name} cannot be timed: {answer['error']}")
    times: list[list[float]] = answer["times"]
    return times


def stop_worker(process: subprocess.Popen[str]) -> None:
    """End such a process."""
    process.kill()
    process.communicate()


def run_worker(runtime: str, threads: int, requests: Iterable[str]) -> None:
    """Answer `request_timings` line by line."""
    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr
    opened: dict[str, partial[Any]] = {}
    for line in requests:
        request = json.loads(line)
        files = request["files"]
        opened = {name: forward for name, forward in opened.items() if name in files}
        try:
            for name in files:
                if name not in opened:
                    opened[name] = _open(Path(name), runtime, threads, alone=len(files) == 1)
            answer: dict[str, Any] = {
                "times": metrics.time_interleaved([opened[name] for name in files], request["rounds"])
            }
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _open(file: Path, runtime: str, threads: int, alone: bool) -> partial[Any]:
    forward = load_runner(file, threads, runtime=runtime, exclusive=alone)
    with np.load(file.with_name(INPUTS)) as found:
        inputs = [torch.from_numpy(found[name]) for name in found.files]
    return partial(forward, *_laid_out(inputs, get_runtime(runtime)))


def _laid_out(values: Any, runtime: Runtime) -> Any:
    """Inputs in the memory format that the runtime is timed on."""
    return to_channels_last(values) if runtime.is_channels_last else values


if __name__ == "__main__":
    run_worker(sys.argv[1], int(sys.argv[2]), sys.stdin)
