"""The process in which stored inference forms are timed: one JSON request and one JSON answer a line.

`python -m ghostify.timing.worker RUNTIME THREADS`; see `timer.request_timings` for the other side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ghostify.runtimes.registry import Runtime, get_runtime, load_runner
from ghostify.runtimes.tensors import to_channels_last
from ghostify.timing.interleaved import time_interleaved

INPUTS = "inputs.npz"


def run_worker(runtime: str, threads: int, requests: Iterable[str]) -> None:
    """Answer each request, {"files": [...], "rounds": n}, with {"times": ms per file and round} or {"error": text}.

    Files of the previous request stay open.
    """
    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr
    forwards: dict[str, partial[Any]] = {}
    for line in requests:
        request = json.loads(line)
        files = request["files"]
        forwards = {file: forward for file, forward in forwards.items() if file in files}
        try:
            for file in files:
                if file not in forwards:
                    forwards[file] = _open(Path(file), runtime, threads, exclusive=len(files) == 1)
            answer: dict[str, Any] = {"times": time_interleaved([forwards[file] for file in files], request["rounds"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _open(file: Path, runtime: str, threads: int, exclusive: bool) -> partial[Any]:
    """One forward of a stored inference form on the example inputs stored next to it."""
    forward = load_runner(file, threads, runtime=runtime, exclusive=exclusive)
    with np.load(file.with_name(INPUTS)) as arrays:
        inputs = [torch.from_numpy(arrays[name]) for name in arrays.files]
    return partial(forward, *to_timed_format(inputs, get_runtime(runtime)))


def to_timed_format(inputs: Any, runtime: Runtime) -> Any:
    """Inputs in the memory format that the runtime is timed on."""
    return to_channels_last(inputs) if runtime.is_channels_last else inputs


if __name__ == "__main__":
    run_worker(sys.argv[1], int(sys.argv[2]), sys.stdin)
