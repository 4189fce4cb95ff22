"""Feature maps and kernels as grey images."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

TILE_SIDE = 112
BLACK_AND_WHITE_QUANTILES = (0.01, 0.99)


def grey_tile(values: Tensor, scale: Tensor, side: int = TILE_SIDE) -> Tensor:
    """Values (H x W) as a tile (1 x `side` x `side`); the 1st percentile of `scale` is black, the 99th white."""
    low, high = torch.quantile(scale.flatten().float(), torch.tensor(BLACK_AND_WHITE_QUANTILES))
    grey = ((values.float() - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return F.interpolate(grey[None, None], (side, side), mode="nearest")[0]


def grid(tiles: list[Tensor], columns: int) -> Image.Image:
    """Tiles row by row, with white between them."""
    pixels = make_grid(tiles, nrow=columns, pad_value=1.0)
    return Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())


def write_grid(tiles: list[Tensor], columns: int, file: Path) -> Path:
    """Write a grid of tiles as a PNG file."""
    grid(tiles, columns).save(file)
    return file


def data_uri(tile: Tensor) -> str:
    """One tile as a PNG data URI, for a page without other files."""
    buffer = io.BytesIO()
    Image.fromarray((tile[0] * 255).byte().numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
