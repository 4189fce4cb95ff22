"""Peak memory of a training step before and after conversion: parameters, gradients, optimizer, activations.

    python benchmarks/experiments/memory.py

A step of SGD with momentum on images of 224 x 224, in torch's own memory tracker, which counts every live storage.
Weights are random: memory does not depend on them. Results go to benchmarks/results/memory.json.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.tables import Row, options, publish
from ghostify import ghostify

NETWORKS = ("resnet18", "resnet50", "vgg16_bn", "vgg11", "densenet121", "mobilenet_v2")
FORMS: dict[str, dict[str, Any]] = {
    "original": {"ratio": 1},
    "ratio 2, depthwise": {"ratio": 2},
    "ratio 2, pointwise": {"ratio": 2, "cheap": "pointwise"},
}
BATCH = 8


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def peak(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Peak bytes of a second step, by category."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9)
    step(model, optimizer, x)
    tracker = MemTracker()
    tracker.track_external(model, optimizer, x)
    with tracker:
        step(model, optimizer, x)
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {str(getattr(kind, "value", kind)): size for kind, size in snapshot.items()}


def rows() -> Iterator[Row]:
    x = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for network in NETWORKS:
        torch.manual_seed(0)
        model = torchvision.models.get_model(network, weights=None)
        original_bytes = None
        for form, settings in FORMS.items():
            peak_bytes = peak(ghostify(model, **settings), x)
            original_bytes = original_bytes or peak_bytes["Total"]
            yield {"how": f"{network}, {form}", "bytes": peak_bytes, "share": peak_bytes["Total"] / original_bytes}


def main() -> None:
    options(__doc__).parse_args()
    publish("memory", rows(), batch=BATCH)


if __name__ == "__main__":
    main()
