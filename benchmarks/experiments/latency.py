"""Milliseconds before and after conversion, in every runtime, compared with two other methods.

    python benchmarks/experiments/latency.py
    python benchmarks/experiments/latency.py --networks resnet50 --runtimes onnx --threads 1 --batch 8 --name other

The original and the converted models are all in inference form (`deploy`: norms folded, channels last), each in its
own process, and are timed alternately: medians of at least 30 forwards each after a warm-up. Weights are random, since
time does not depend on them; fits are data-free, and plans for a budget are made with random weights too. "0.55 of the
time" is an additional latency budget, planned for the runtime by times measured in it. Torch-Pruning prunes channels,
low rank factors filters, both to half the multiply-accumulates. Images are 224 x 224. Resumes after an interruption.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.catalogue import LATENCY
from benchmarks.lib.forms import FORMS, NETWORKS, TIMED, build
from benchmarks.lib.tables import Row, options, publish, recorded
from ghostify import GhostifyError, save
from ghostify.deployment.inference_form import deploy
from ghostify.planning.cost import count_macs
from ghostify.runtimes.registry import RUNTIMES
from ghostify.timing.timer import export_for_timing, request_timings, start_worker, stop_worker
from ghostify.timing.worker import INPUTS

TURNS, REPEATS, PAUSE = 8, 5, 0.05


def stored(model: nn.Module, runtime: str, x: Tensor, folder: Path) -> Path:
    """The model's inference form, in a file or folder that a process of that runtime opens."""
    deployed = deploy(model, x)
    if not RUNTIMES[runtime].loads_folders:
        return export_for_timing(deployed, runtime, x, folder)
    folder.mkdir()
    np.savez(folder / INPUTS, x.numpy())
    return save(deployed, folder / "model")


def interleaved_ms(runtime: str, paths: list[Path], threads: int) -> list[float]:
    """Median milliseconds of each, in processes of their own."""
    workers = [start_worker(runtime, threads) for _ in paths]
    latencies_ms: list[list[float]] = [[] for _ in workers]
    try:
        for worker, path in zip(workers, paths, strict=True):
            request_timings(worker, [path], 1)
        for _ in range(TURNS):
            for worker, path, latencies in zip(workers, paths, latencies_ms, strict=True):
                time.sleep(PAUSE)  # until the other's threads stop spinning
                latencies += request_timings(worker, [path], REPEATS)[0]
    finally:
        for worker in workers:
            stop_worker(worker)
    return [statistics.median(latencies) for latencies in latencies_ms]


def rows(
    previous_rows: list[Row], networks: list[str], forms: list[str], runtimes: list[str], threads: int, batch: int
) -> Iterator[Row]:
    yield from previous_rows
    finished = {row["how"].rsplit(", original", 1)[0] for row in previous_rows if row["how"].endswith(", original")}
    for network in networks:
        missing = [runtime for runtime in runtimes if f"{network}, {runtime}" not in finished]
        if not missing:
            continue
        x = torch.rand(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        converted = {form: FORMS[form](build(network), x[:1], "") for form in ("original", *forms) if form != TIMED}
        for runtime in missing:
            models = dict(converted)
            if TIMED in forms and not RUNTIMES[runtime].compiles_slowly:
                try:
                    models[TIMED] = FORMS[TIMED](build(network), x[:1], runtime)
                except GhostifyError as error:
                    print(f"{network}, {runtime}: {error}", flush=True)
            macs = [count_macs(m, x[:1]) for m in models.values()]
            with tempfile.TemporaryDirectory() as folder:
                paths = [stored(m, runtime, x, Path(folder) / str(k)) for k, m in enumerate(models.values())]
                medians = interleaved_ms(runtime, paths, threads)
            for form, count, latencies_ms in zip(models, macs, medians, strict=True):
                how = f"{network}, {runtime}, {form}"
                yield {"how": how, "macs": count / macs[0], "ms": latencies_ms, "times": medians[0] / latencies_ms}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--forms", nargs="+", default=list(FORMS)[1:], choices=list(FORMS)[1:])
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--name", default="latency", help="of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    publish(
        arguments.name,
        rows(
            recorded(arguments.name),
            arguments.networks,
            arguments.forms,
            arguments.runtimes,
            arguments.threads,
            arguments.batch,
        ),
        LATENCY,
        threads=arguments.threads,
        batch=arguments.batch,
    )


if __name__ == "__main__":
    main()
