"""Feature maps and kernels as grey pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

SIDE = 112


def grey_tile(shown: Tensor, scale: Tensor, side: int = SIDE) -> Tensor:
    """A map (H x W) as 1 x `side` x `side`, black and white being the 1st and 99th percentile of `scale`."""
    low, high = torch.quantile(scale.flatten().float(), torch.tensor([0.01, 0.99]))
    grey = ((shown.float() - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return F.interpolate(grey[None, None], (side, side), mode="nearest")[0]


def grid(tiles: list[Tensor], columns: int) -> Image.Image:
    """Tiles row by row, with white between them."""
    made = make_grid(tiles, nrow=columns, pad_value=1.0)
    return Image.fromarray((made * 255).byte().permute(1, 2, 0).numpy())


def write(tiles: list[Tensor], columns: int, file: Path) -> Path:
    """A grid as a PNG file."""
    grid(tiles, columns).save(file)
    return file


def data_uri(shown: Tensor) -> str:
    """One tile as a data address, for a page that needs no other file."""
    buffer = io.BytesIO()
    Image.fromarray((shown[0] * 255).byte().numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
