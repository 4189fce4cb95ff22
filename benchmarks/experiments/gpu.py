"""Milliseconds on a GPU before and after conversion, both in inference form, compared with two other methods.

    python benchmarks/experiments/gpu.py

torchvision's networks with random weights (time does not depend on them), 32 images of 224 x 224, in float16 and in
float32 with TF32. Each model's forward is captured as a CUDA graph and replayed, so that launching kernels costs
nothing; the models are timed alternately, medians of 20 rounds between CUDA events. Resumes after an interruption;
results go to benchmarks/results/gpu.json.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib import forms as timed
from benchmarks.lib.tables import Row, options, publish, recorded
from ghostify.deployment.inference_form import deploy
from ghostify.planning.cost import count_macs

NETWORKS = ("resnet18", "resnet34", "resnet50", "mobilenet_v2")
DTYPES = {"float16": torch.float16, "float32": torch.float32}
BATCH, TURNS, REPEATS, WARMUP = 32, 20, 5, 3
FORMS = {form: convert for form, convert in timed.FORMS.items() if form != timed.TIMED}


def captured(model: nn.Module, x: Tensor) -> torch.cuda.CUDAGraph:
    """One forward, ready to be replayed."""
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(WARMUP):
            model(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        model(x)
    return graph


def interleaved_ms(graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
    """Median milliseconds of one forward of each."""
    latencies_ms: list[list[float]] = [[] for _ in graphs]
    for turn in range(WARMUP + TURNS):
        for graph, latencies in zip(graphs, latencies_ms, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPEATS):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn >= WARMUP:
                latencies.append(begin.elapsed_time(end) / REPEATS)
    return [statistics.median(latencies) for latencies in latencies_ms]


def rows(previous_rows: list[Row], networks: Sequence[str], forms: Sequence[str]) -> Iterator[Row]:
    yield from previous_rows
    finished = {row["how"] for row in previous_rows}
    for network in networks:
        missing = [f for f in forms if any(f"{network}, {dtype}, {f}" not in finished for dtype in DTYPES)]
        if not missing:
            continue
        x = torch.rand(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        converted = {form: FORMS[form](timed.build(network), x[:1], "") for form in ("original", *missing)}
        macs = {form: count_macs(model, x[:1]) for form, model in converted.items()}
        for name, dtype in DTYPES.items():
            inputs = x.to("cuda", dtype).contiguous(memory_format=torch.channels_last)
            models = {form: deploy(model, x[:1]).to("cuda", dtype) for form, model in converted.items()}
            medians = interleaved_ms([captured(model, inputs) for model in models.values()])
            for form, latencies_ms in zip(models, medians, strict=True):
                share, how = macs[form] / macs["original"], f"{network}, {name}, {form}"
                if how not in finished:
                    yield {"how": how, "macs": share, "ms": latencies_ms, "times": medians[0] / latencies_ms}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--forms", nargs="+", default=list(FORMS)[1:], choices=list(FORMS)[1:])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU on this machine")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    publish(
        "gpu",
        rows(recorded("gpu"), arguments.networks, arguments.forms),
        gpu=torch.cuda.get_device_name(),
        batch=BATCH,
    )


if __name__ == "__main__":
    main()
