"""Photographed objects on photographed backgrounds, out of Debian packages; cached as tensors outside the repository.

The objects are those of tuxpaint-stamps-default, the backgrounds those of mate-backgrounds and
plasma-workspace-wallpapers. One half of the objects and of the backgrounds makes the calibration images, the other
half the test images.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ghostify.timing.latency import cache_folder

FOLDER = Path(os.environ.get("GHOSTIFY_PHOTOGRAPHS", "/usr/share"))
PACKAGES = ("tuxpaint-stamps-default", "mate-backgrounds", "plasma-workspace-wallpapers")
NO_PHOTOGRAPHS = (
    *("cartoon", "_mirror", "/symbols/", "/flags", "/letters", "hands", "/numbers", "/shapes", "/speech"),
    *("silhouette", "/hobbies/", "/religion"),
)
RESOLUTIONS = ("1920x1080", "2560x1440", "1920x1200")
SIZE, LARGEST_BACKGROUND = 224, 1200
WITHOUT_OBJECT = 0.12
CALIBRATION, TEST = 1024, 384
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def composites(calibration: int = CALIBRATION, test: int = TEST) -> tuple[Tensor, Tensor]:
    """Calibration and test images (uint8, N x 3 x SIZE x SIZE), from the cache or made now."""
    path = cache_folder() / f"composites-{calibration}-{test}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_made(calibration, test), path)
    images = load_file(path)
    return images["calibration"], images["test"]


def normalised(images: Tensor) -> Tensor:
    """Float32 images as networks trained on ImageNet take them, of uint8 ones."""
    mean, deviation = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return torch.cat([((part.float() / 255 - mean) / deviation).float() for part in images.split(64)])


def objects() -> list[Path]:
    """The photographed stamps, with transparency."""
    files = sorted((FOLDER / "tuxpaint/stamps").glob("**/*.png"))
    return [file for file in files if not any(word in str(file) for word in NO_PHOTOGRAPHS)]


def backgrounds() -> list[Path]:
    """Photographs and wallpapers."""
    nature = sorted((FOLDER / "backgrounds/mate/nature").glob("*.jpg"))
    wallpapers = sorted((FOLDER / "wallpapers").glob("*/contents/images/*"))
    return nature + [file for file in wallpapers if any(size in file.name for size in RESOLUTIONS)]


def halves(files: Sequence[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """The files in two parts that share none, drawn by seed."""
    drawn = list(files)
    random.Random(seed).shuffle(drawn)
    return drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]


def _made(calibration: int, test: int) -> dict[str, Tensor]:
    found = objects(), backgrounds()
    if not all(found):
        sys.exit(
            f"{FOLDER}: has no photographs. Install {', '.join(PACKAGES)} (Debian), or unpack them with dpkg -x "
            "and set GHOSTIFY_PHOTOGRAPHS to the folder usr/share there."
        )
    parts = zip(halves(found[0], 0), halves(found[1], 1), strict=True)
    names = {"calibration": (1, calibration), "test": (2, test)}
    return {name: _pasted(seed, *part, count) for (name, (seed, count)), part in zip(names.items(), parts, strict=True)}


def _pasted(seed: int, stamps: Sequence[Path], scenes: Sequence[Path], count: int) -> Tensor:
    """`count` crops of the scenes, most with one of the stamps on it, each stamp in turn."""
    draw = random.Random(seed)
    pictures = []
    for k in range(count):
        picture = _crop(_background(draw.choice(scenes)), draw)
        if draw.random() > WITHOUT_OBJECT:
            _paste(Image.open(stamps[k % len(stamps)]).convert("RGBA"), picture, draw)
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return torch.stack(pictures)


@cache
def _background(file: Path) -> Image.Image:
    picture = Image.open(file).convert("RGB")
    picture.thumbnail((LARGEST_BACKGROUND, LARGEST_BACKGROUND))
    return picture


def _crop(picture: Image.Image, draw: random.Random) -> Image.Image:
    """A square of at least SIZE pixels where the picture has as many, resized to SIZE."""
    side = draw.randint(min(SIZE, *picture.size), min(picture.size))
    x, y = draw.randint(0, picture.width - side), draw.randint(0, picture.height - side)
    return picture.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _paste(stamp: Image.Image, picture: Image.Image, draw: random.Random) -> None:
    """At 0.7 to 1.05 of the picture's size, anywhere."""
    scale = draw.uniform(0.7, 1.05) * SIZE / max(stamp.size)
    width, height = (max(1, int(side * scale)) for side in stamp.size)
    x, y = (draw.randint(min(0, SIZE - side), max(0, SIZE - side)) for side in (width, height))
    resized = stamp.resize((width, height), Image.Resampling.BICUBIC)
    picture.paste(resized, (x, y), resized)
