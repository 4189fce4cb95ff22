"""Latencies of inference forms in one runtime: in this process, or in a worker process (see `worker`)."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from ghostify.deployment.exporter import write_unchecked
from ghostify.errors import GhostifyError
from ghostify.graph.inputs import as_arguments, tensor_leaves
from ghostify.io.output import writing_to
from ghostify.runtimes.registry import Runtime, check_supported, get_runtime, installed_version, require_runtime
from ghostify.runtimes.tensors import ExportInputs
from ghostify.timing.interleaved import interleaved_latency_ms
from ghostify.timing.worker import INPUTS, to_timed_format

ROUNDS = 15


class LatencyTimer:
    """A context in which inference forms are timed in one runtime, with the current number of threads.

    "eager" runs in this process, on the device of the example. All other runtimes run on the CPU, in one process that
    ends with the context, so that the threads of different runtimes do not disturb each other. `version` is part of
    the keys of measured latencies.
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

    def latencies_ms(self, deployed: Sequence[nn.Module], examples: Sequence[Any], rounds: int = ROUNDS) -> list[float]:
        """Median latency (ms) of one forward of each inference form (see `deploy`) on its example, interleaved.

        Raises `GhostifyError` for inputs that the runtime does not support.
        """
        for example in examples:
            check_supported(self.runtime, example)
        if self.runtime.is_in_process:
            inputs = [to_timed_format(example, self.runtime) for example in examples]
            return interleaved_latency_ms(deployed, inputs, rounds=rounds)
        with tempfile.TemporaryDirectory() as folder:
            with writing_to(folder):
                files = [
                    export_for_timing(model, self.runtime.name, example, Path(folder) / str(k))
                    for k, (model, example) in enumerate(zip(deployed, examples, strict=True))
                ]
            if self.process is None:
                self.process = start_worker(self.runtime.name, torch.get_num_threads())
            return [statistics.median(times) for times in request_timings(self.process, files, rounds)]


def export_for_timing(deployed: nn.Module, runtime: str, example: Any, folder: Path) -> Path:
    """Write an inference form and its example inputs to a new folder, for a worker; returns the file of the model."""
    target, (args, _) = get_runtime(runtime), as_arguments(example)
    check_supported(target, example)
    folder.mkdir(parents=True)
    np.savez(folder / INPUTS, *[x.numpy() for x in tensor_leaves(args)])
    return write_unchecked(deployed, ExportInputs(args, {}), folder, target, for_timing=True)


def start_worker(runtime: str, threads: int) -> subprocess.Popen[str]:
    """A process that times stored inference forms in one runtime; requests go to its standard input."""
    command = [sys.executable, "-m", "ghostify.timing.worker", runtime, str(threads)]
    pipe, path = subprocess.PIPE, os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment)


def request_timings(process: subprocess.Popen[str], files: Sequence[Path], rounds: int) -> list[list[float]]:
    """Latencies (ms) of every round of each stored inference form, interleaved; raises `GhostifyError`."""
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
        raise GhostifyError(f"{files[0].name}: cannot be timed ({answer['error']}). Use another runtime.")
    times: list[list[float]] = answer["times"]
    return times


def stop_worker(process: subprocess.Popen[str]) -> None:
    """End a worker process."""
    process.kill()
    process.communicate()
