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

TURNS, EACH, PAUSE = 8, 5, 0.05


def stored(model: nn.Module, runtime: str, x: Tensor, folder: Path) -> Path:
    """The model's inference form, as a process of that runtime opens it."""
    small = deploy(model, x)
    if not RUNTIMES[runtime].loads_folders:
        return export_for_timing(small, runtime, x, folder)
    folder.mkdir()
    np.savez(folder / INPUTS, x.numpy())
    return save(small, folder / "model")


def taking_turns(runtime: str, paths: list[Path], threads: int) -> list[float]:
    """Median milliseconds of each, in processes of their own."""
    workers = [start_worker(runtime, threads) for _ in paths]
    spent: list[list[float]] = [[] for _ in workers]
    try:
        for worker, path in zip(workers, paths, strict=True):
            request_timings(worker, [path], 1)
        for _ in range(TURNS):
            for worker, path, own in zip(workers, paths, spent, strict=True):
                time.sleep(PAUSE)  # the other's threads stop spinning
                own += request_timings(worker, [path], EACH)[0]
    finally:
        for worker in workers:
            stop_worker(worker)
    return [statistics.median(own) for own in spent]


def rows(
    known: list[Row], networks: list[str], forms: list[str], runtimes: list[str], threads: int, batch: int
) -> Iterator[Row]:
    yield from known
    done = {row["how"].rsplit(", original", 1)[0] for row in known if row["how"].endswith(", original")}
    for network in networks:
        missing = [runtime for runtime in runtimes if f"{network}, {runtime}" not in done]
        if not missing:
            continue
        x = torch.rand(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        made = {form: FORMS[form](build(network), x[:1], "") for form in ("original", *forms) if form != TIMED}
        for runtime in missing:
            models = dict(made)
            if TIMED in forms and not RUNTIMES[runtime].compiles_slowly:
                try:
                    models[TIMED] = FORMS[TIMED](build(network), x[:1], runtime)
                except GhostifyError as error:
                    print(f"{network}, {runtime}: {error}", flush=True)
            macs = [count_macs(m, x[:1]) for m in models.values()]
            with tempfile.TemporaryDirectory() as folder:
                paths = [stored(m, runtime, x, Path(folder) / str(k)) for k, m in enumerate(models.values())]
                taken = taking_turns(runtime, paths, threads)
            for form, count, spent in zip(models, macs, taken, strict=True):
                how = f"{network}, {runtime}, {form}"
                yield {"how": how, "macs": count / macs[0], "ms": spent, "times": taken[0] / spent}


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
