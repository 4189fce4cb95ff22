"""Milliseconds before and after, in four runtimes, both sides in their best form.

    python benchmarks/latency.py                                  the table of the README
    python benchmarks/latency.py --networks resnet50 --runtimes onnx --threads 1 --batch 8

The original and the converted model, both by `deploy` (norms folded, channels last), each in a process of its own,
take turns: medians of at least 30 forwards each, warmed up. Weights are random (time does not depend on them), fits
data-free. Images are 224 x 224.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from tables import Row, options, publish
from torch import Tensor, nn

from ghostify import ghostify, load, report, save
from ghostify.deploy import deploy
from ghostify.export import export, runner

RUNTIMES = ("eager", "compile", "onnx", "openvino")
NETWORKS = ("vgg16_bn", "resnet18", "resnet34", "resnet50", "densenet121", "mobilenet_v2")
FORMS: dict[str, dict[str, Any]] = {
    "ratio 2, depthwise": {"ratio": 2},
    "ratio 2, pointwise": {"ratio": 2, "cheap": "pointwise"},
    "auto, half the MACs": {"cheap": "auto", "budget": {"macs": 0.5}},
}
TURNS, EACH, PAUSE = 8, 5, 0.05


def build(network: str) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(network, weights=None).eval()


def saved(model: nn.Module, runtime: str, x: Tensor, folder: Path) -> Path:
    """The model in a form that `serve` opens."""
    if runtime in ("onnx", "openvino"):
        return export(model, folder, format=runtime, example_inputs=x)
    return save(deploy(model, x), folder)


def opened(runtime: str, path: Path, threads: int) -> Callable[[Tensor], Any]:
    torch.set_num_threads(threads)
    if runtime in ("onnx", "openvino"):
        return runner(path, threads)
    model = load(path).eval()
    if runtime == "compile":
        import torch._inductor.config as inductor

        inductor.freezing = True
        return torch.compile(model)
    return model


def serve(runtime: str, path: Path, threads: int, batch: int) -> None:
    """For each line on standard input one turn: the milliseconds of EACH forwards."""
    x = torch.rand(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=torch.channels_last) if runtime in ("eager", "compile") else x
    run = opened(runtime, path, threads)
    with torch.no_grad():
        for _ in range(EACH):
            run(x)
        print("ready", flush=True)
        for _ in sys.stdin:
            spent = []
            for _ in range(EACH):
                started = time.perf_counter()
                run(x)
                spent.append(1000 * (time.perf_counter() - started))
            print(json.dumps(spent), flush=True)


def taking_turns(runtime: str, paths: list[Path], threads: int, batch: int) -> list[float]:
    """Median milliseconds of each, in processes of their own."""
    common = ["--threads", str(threads), "--batch", str(batch)]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--serve", runtime, str(p), *common],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for p in paths
    ]
    spent: list[list[float]] = [[] for _ in workers]
    try:
        for worker in workers:
            while (line := worker.stdout.readline()) != "ready\n":
                if not line:
                    raise SystemExit(f"{runtime} does not run here")
        for _ in range(TURNS):
            for worker, own in zip(workers, spent, strict=True):
                time.sleep(PAUSE)  # the other's threads stop spinning
                worker.stdin.write("\n")
                worker.stdin.flush()
                own += json.loads(worker.stdout.readline())
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [statistics.median(own) for own in spent]


def rows(networks: list[str], runtimes: list[str], threads: int, batch: int) -> Iterator[Row]:
    for network in networks:
        x = torch.rand(batch, 3, 224, 224)
        models = {"original": ghostify(build(network), 1)}
        macs = {"original": 1.0}
        for form, wished in FORMS.items():
            made = ghostify(build(network), example_inputs=x[:1], **wished)
            found = report(made)
            models[form], macs[form] = made, found.macs_after / found.macs_before
        for runtime in runtimes:
            with tempfile.TemporaryDirectory() as folder:
                paths = [saved(m, runtime, x[:1], Path(folder) / str(k)) for k, m in enumerate(models.values())]
                taken = taking_turns(runtime, paths, threads, batch)
            for form, spent in zip(models, taken, strict=True):
                yield {
                    "how": f"{network}, {runtime}, {form}",
                    "macs": macs[form],
                    "ms": spent,
                    "times": taken[0] / spent,
                }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--name", default="latency", help="of the result file")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], Path(arguments.serve[1]), arguments.threads, arguments.batch)
        return
    publish(
        arguments.name,
        f"batch {arguments.batch}, {arguments.threads} threads",
        {
            "MACs %": lambda r: f"{100 * r['macs']:.0f}",
            "ms": lambda r: f"{r['ms']:.1f}",
            "times as fast": lambda r: f"{r['times']:.2f}",
        },
        rows(arguments.networks, arguments.runtimes, arguments.threads, arguments.batch),
        threads=arguments.threads,
        batch=arguments.batch,
    )


if __name__ == "__main__":
    main()
