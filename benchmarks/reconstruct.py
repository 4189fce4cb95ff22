"""What block-wise reconstruction adds to the closed-form fit: ResNet-20 of width 32 on Fashion-MNIST.

    python benchmarks/reconstruct.py

As benchmarks/accuracy.py: 512 unlabelled training images, no labels; top-1 and agreement with the original on all
10,000 test images, which nothing else sees. Results go to benchmarks/results/reconstruct.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from accuracy import RESULTS, calibration
from networks import images, resnet20

from ghostify import Policy, Rule, ghostify, report
from ghostify.checkpoint import versions
from ghostify.cost import count_macs
from ghostify.evaluate import outputs, relative_error, top1

FORMS: list[tuple[str, Rule, dict[str, float] | None]] = [
    ("ratio 2, depthwise d=3", Rule(ratio=2), None),
    ("auto, a quarter of the MACs", Rule(cheap="auto"), {"macs": 0.25}),
]


def rows() -> Iterator[dict[str, Any]]:
    """Each form without and with reconstruction."""
    data = images()
    model, batches = resnet20(data), calibration(data, 512, 0).split(64)
    test, first = data.test.split(500), data.test[:1]
    wanted = outputs(model, test)
    yield {"how": "original", "top1": top1(wanted, data.test_labels)}
    for name, rule, budget in FORMS:
        for again in (False, True):
            options = {"policy": Policy((rule,)), "budget": budget, "example_inputs": first, "calibration": batches}
            made = ghostify(model, **options, reconstruct=again)
            answers = outputs(made, test)
            yield {
                "how": name + ", reconstructed" * again,
                "top1": top1(answers, data.test_labels),
                "agreement": top1(answers, wanted.argmax(1)),
                "error": relative_error(answers, wanted),
                "macs": count_macs(made, first),
                "seconds": sum(report(made).seconds.values()),
            }


if __name__ == "__main__":
    found = []
    for row in rows():
        found.append(row)
        print(*(f"{v:.4g}" if isinstance(v, float) else v for v in row.values()), flush=True)
    content = {
        "command": "python benchmarks/reconstruct.py",
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    RESULTS.with_name("reconstruct.json").write_text(json.dumps({**content, "rows": found}, indent=1) + "\n")
