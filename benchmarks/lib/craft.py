"""CRAFT, EasyOCR's text detector, with EasyOCR's weights; its score maps and boxes, compared with the original's."""

from __future__ import annotations

from pathlib import Path

import cv2
import easyocr_en_models
import numpy as np
import torch
from easyocr.craft import CRAFT
from easyocr.craft_utils import getDetBoxes
from torch import Tensor, nn

from ghostify.graph.modes import eval_mode

WEIGHTS = Path(easyocr_en_models.__file__).parent / "models" / "craft_mlt_25k.pth"
TEXT_THRESHOLD, LINK_THRESHOLD, LOW_TEXT = 0.7, 0.4, 0.4
OVERLAP = 0.5
HALF = {"macs": 0.5}


def craft() -> nn.Module:
    """The detector with EasyOCR's weights."""
    model = CRAFT()
    tensors = torch.load(WEIGHTS, map_location="cpu", weights_only=True)
    model.load_state_dict({name.removeprefix("module."): value for name, value in tensors.items()})
    return model.eval()


def has_few_outputs(_: str, module: nn.Module) -> bool:
    """Whether a convolution has fewer than 32 outputs: in CRAFT, the last ones of the score head."""
    return module.out_channels < 32


def score_maps(model: nn.Module, pages: Tensor) -> Tensor:
    """Text and link scores (N x 2 x H/2 x W/2)."""
    with eval_mode(model):
        return torch.cat([model(batch)[0] for batch in pages.split(2)]).permute(0, 3, 1, 2)


def map_error(scores: Tensor, reference: Tensor) -> float:
    spread = reference - reference.mean((0, 2, 3), keepdim=True)
    return float((scores - reference).square().sum() / spread.square().sum())


def boxes(scores: Tensor) -> list[list[np.ndarray]]:
    """The corners of EasyOCR's boxes, page by page."""
    return [getDetBoxes(*page.numpy(), TEXT_THRESHOLD, LINK_THRESHOLD, LOW_TEXT)[0] for page in scores.contiguous()]


def matches(found: list[np.ndarray], expected: list[np.ndarray]) -> int:
    """How many boxes of one page match, one to one, the largest overlaps first."""
    overlaps = np.array([[overlap(a, b) for b in expected] for a in found]).reshape(len(found), len(expected))
    count = 0
    while overlaps.size and overlaps.max() >= OVERLAP:
        a, b = np.unravel_index(overlaps.argmax(), overlaps.shape)
        overlaps[a], overlaps[:, b] = 0, 0
        count += 1
    return count


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two convex polygons."""
    common = cv2.intersectConvexConvex(a, b)[0]
    return common / max(cv2.contourArea(a) + cv2.contourArea(b) - common, 1e-9)


def agreement(scores: Tensor, reference: Tensor) -> dict[str, float]:
    """Errors of the maps; precision, recall and F1 of the boxes over all pages together, in percent."""
    found, expected = boxes(scores), boxes(reference)
    hits = sum(matches(f, e) for f, e in zip(found, expected, strict=True))
    found_count, expected_count = sum(map(len, found)), sum(map(len, expected))
    return {
        "error": map_error(scores, reference),
        "text_error": map_error(scores[:, :1], reference[:, :1]),
        "link_error": map_error(scores[:, 1:], reference[:, 1:]),
        "boxes": found_count,
        "precision": 100 * hits / max(found_count, 1),
        "recall": 100 * hits / max(expected_count, 1),
        "f1": 200 * hits / max(found_count + expected_count, 1),
    }
