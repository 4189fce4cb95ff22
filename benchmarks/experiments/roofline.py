"""A lower bound of the latency: multiply-accumulates and bytes of every layer against this machine's measured peaks.

    python benchmarks/experiments/roofline.py

A layer takes at least max(MACs / peak MACs a second, bytes / peak bytes a second). Bytes are its weights, inputs and
outputs, each once. The peaks are the best of large matrix products (PyTorch, NumPy) and of a 3 x 3 convolution, and
that of reading a vector much larger than the caches, with the current number of threads. They are summed over the
inference forms (`deploy`) of original and ghosts. No kernel can exceed the ratio of the sums. What is bound by memory,
above all linear layers, does not become faster with fewer MACs. Results go to benchmarks/results/roofline.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.forms import FORMS, NETWORKS, build
from benchmarks.lib.tables import Row, options, publish
from ghostify.deployment.inference_form import deploy
from ghostify.graph.op_queries import is_concat

ROUNDS = 40
SIDE, LONG = 2048, 2**27
KINDS = {nn.Conv2d: "convolutions", nn.Linear: "linear layers"}


def best_seconds(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def peaks() -> dict[str, float]:
    """MACs and bytes a second."""
    a, long = torch.rand(SIDE, SIDE), torch.ones(LONG)
    b = a.numpy()
    maps, filters = torch.rand(8, 256, 56, 56).contiguous(memory_format=torch.channels_last), torch.rand(256, 256, 3, 3)
    products: dict[Callable[[], Any], float] = {
        lambda: a @ a: SIDE**3,
        lambda: b @ b: SIDE**3,
        lambda: F.conv2d(maps, filters, padding=1): maps.numel() * filters[0].numel(),
    }
    return {
        "macs": max(count / best_seconds(work) for work, count in products.items()),
        "bytes": 4 * LONG / best_seconds(lambda: long.sum()),
    }


class Layers(fx.Interpreter):
    """MACs and bytes of every convolution, linear layer and concatenation of one forward."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.layers: list[tuple[str, float, float]] = []

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        if n.op == "call_module":
            inner = self.fetch_attr(str(n.target))
            layer_input = self.env[n.args[0]] if n.args and n.args[0] in self.env else None
            if type(inner) in KINDS and isinstance(layer_input, Tensor):
                macs_per_output = inner.weight[0].numel()
                size = 4 * (inner.weight.numel() + layer_input.numel() + output.numel())
                self.layers.append((KINDS[type(inner)], output.numel() * macs_per_output, size))
        elif is_concat(n):
            self.layers.append(("concatenations", 0, 8 * output.numel()))
        return output


def rows(peak: dict[str, float]) -> Iterator[Row]:
    x = torch.rand(1, 3, 224, 224)
    for network in NETWORKS:
        first = None
        for form in ("original", "ratio 2, depthwise", "ratio 2, pointwise", "half the MACs"):
            deployed: Any = deploy(FORMS[form](build(network), x, ""), x)
            layers = Layers(deployed)
            layers.garbage_collect_values = False
            with torch.no_grad():
                layers.run(x)
            bound: dict[str, float] = {}
            for kind, macs, size in layers.layers:
                bound_ms = 1000 * max(macs / peak["macs"], size / peak["bytes"])
                bound[kind] = bound.get(kind, 0) + bound_ms
            total = sum(bound.values())
            first = first or total
            yield {"how": f"{network}, {form}", "bound": bound, "total": total, "times": first / total}


def main() -> None:
    options(__doc__).parse_args()
    peak = peaks()
    print(f"{peak['macs'] / 1e9:.0f} G MACs/s, {peak['bytes'] / 1e9:.1f} GB/s")
    publish("roofline", rows(peak), threads=torch.get_num_threads(), peaks=peak)


if __name__ == "__main__":
    main()
