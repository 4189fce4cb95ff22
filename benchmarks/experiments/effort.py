"""Time and memory of a fit: seconds against two forward passes of the calibration set, memory as the set grows.

    python benchmarks/experiments/effort.py

ResNet-50 at 224 x 224 with random weights whose BatchNorm statistics are estimated on noise: time and memory do not
depend on the weights. Each number of images is measured in its own process, from a stream of batches of 32. Peak
memory is that of the process minus what the model and one forward pass took before. Results go to
benchmarks/results/effort.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.tables import Row, options, publish
from ghostify import Policy, Rule, fit, plan, trace
from ghostify.fitting.sensitivity import prepare_calibration

BATCH = 32
SETTINGS = ((128, "depthwise"), (1280, "depthwise"), (128, "pointwise"))


def stream(images: int) -> Iterator[Tensor]:
    """Smooth noise, batch by batch."""
    for number in range(images // BATCH):
        generator = torch.Generator().manual_seed(number)
        yield F.interpolate(torch.randn(BATCH, 3, 56, 56, generator=generator), size=224, mode="bilinear")


def settled() -> nn.Module:
    """ResNet-50 whose activations neither vanish nor explode."""
    torch.manual_seed(0)
    model = resnet50()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(next(stream(BATCH)))
    return model.eval()


def measure(images: int, cheap: str) -> Row:
    model = settled()
    first = next(stream(BATCH))
    program = trace(model, first[:1])
    ghost_plan = plan(program, Policy((Rule(cheap=cheap),)))
    with torch.inference_mode():
        model(first)
        started = time.perf_counter()
        for _ in range(4):
            model(first)
        forward = (time.perf_counter() - started) / (4 * BATCH) * images
    before = peak()
    started = time.perf_counter()
    fits = fit(program, ghost_plan, prepare_calibration(program, stream(images)))
    elapsed = time.perf_counter() - started
    shares = {name: seconds / elapsed for name, seconds in fits.seconds.items()}
    return {
        "how": f"{cheap}, {images} images",
        "forward": forward,
        "fit": elapsed,
        "shares": shares,
        "peak": peak() - before,
    }


def peak() -> float:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", nargs=2, metavar=("IMAGES", "CHEAP"), help=argparse.SUPPRESS)
    only = parser.parse_args().only
    if only:
        print(json.dumps(measure(int(only[0]), only[1])))
        return

    def rows() -> Iterator[Row]:
        for images, cheap in SETTINGS:
            command = [sys.executable, __file__, "--only", str(images), cheap]
            yield json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    publish("effort", rows())


if __name__ == "__main__":
    main()
