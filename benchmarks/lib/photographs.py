"""The photographs in scikit-image and scikit-learn; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
from PIL import Image

FOLDERS = (Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images")
CALIBRATION = (
    "astronaut",
    "coffee",
    "coins",
    "flower",
    "grass",
    "ihc",
    "moon",
    "motorcycle_left",
    "retina",
    "rocket",
)
TEST = ("brick", "camera", "cell", "chelsea", "china", "gravel", "hubble_deep_field")
SCANS = ("page", "text")  # of printed pages


def photographs(names: tuple[str, ...]) -> list[Image.Image]:
    files = [next(f for folder in FOLDERS for f in folder.glob(f"{name}.*")) for name in names]
    return [Image.open(file).convert("RGB") for file in files]


def random_crop(picture: Image.Image, size: int, draw: np.random.Generator, smallest: float = 0.35) -> Image.Image:
    """A square of at least `smallest` of the shorter side, at any place, mirrored or not, resized to `size`."""
    w, h = picture.size
    side = int(min(w, h) * draw.uniform(smallest, 1))
    x, y = int(draw.integers(w - side + 1)), int(draw.integers(h - side + 1))
    crop = picture.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else crop
