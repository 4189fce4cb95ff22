"""Effect of block-wise reconstruction after the closed-form fit: ResNet-20 of width 32 on Fashion-MNIST.

    python benchmarks/experiments/reconstruct.py

As in accuracy.py: 512 unlabelled training images, no labels; top-1 and agreement with the original on all 10,000 test
images, which nothing else uses. Results go to benchmarks/results/reconstruct.json.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.networks import calibration, images, resnet20
from benchmarks.lib.tables import Row, options, publish
from ghostify import Policy, Rule, ghostify, report
from ghostify.evaluation.metrics import predict, relative_error, top1
from ghostify.planning.cost import count_macs

FORMS: list[tuple[str, Rule, dict[str, float] | None]] = [
    ("ratio 2, depthwise d=3", Rule(ratio=2), None),
    ("auto, a quarter of the MACs", Rule(cheap="auto"), {"macs": 0.25}),
]


def rows() -> Iterator[Row]:
    """Each form without and with reconstruction."""
    data = images()
    model, batches = resnet20(data), calibration(data, 512, 0).split(64)
    test, first = data.test.split(500), data.test[:1]
    reference = predict(model, test)
    yield {"how": "original", "top1": top1(reference, data.test_labels)}
    for name, rule, budget in FORMS:
        for reconstructed in (False, True):
            settings = {"policy": Policy((rule,)), "budget": budget, "example_inputs": first, "calibration": batches}
            converted = ghostify(model, **settings, reconstruct=reconstructed)
            outputs = predict(converted, test)
            yield {
                "how": name + ", reconstructed" * reconstructed,
                "top1": top1(outputs, data.test_labels),
                "agreement": top1(outputs, reference.argmax(1)),
                "error": relative_error(outputs, reference),
                "macs": count_macs(converted, first),
                "seconds": sum(report(converted).seconds.values()),
            }


if __name__ == "__main__":
    options(__doc__).parse_args()
    publish("reconstruct", rows(), threads=torch.get_num_threads())
