"""Random crops, reflections and changes in brightness of images; tensors only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_SIDE = 0.6
GAIN, OFFSET = 0.15, 0.2
MIN_PIXELS = 16
MAX_CHANNELS = 4


def can_augment(images: Tensor) -> bool:
    """Whether values are images (N x C x H x W) that are large enough to crop."""
    is_image = images.dim() == 4 and images.is_floating_point() and images.shape[1] <= MAX_CHANNELS
    return is_image and min(images.shape[2:]) >= MIN_PIXELS


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of each image (N x C x H x W) at the same size, mirrored or not, with other gain and offsets.

    Crops have sides of `MIN_SIDE` to 1 of the image's. Offsets are by channel, in units of the images' deviation.
    """
    n, channels = images.shape[:2]
    side = MIN_SIDE + (1 - MIN_SIDE) * _uniform(n, generator=generator)
    centre = (2 * _uniform(n, 2, generator=generator) - 1) * (1 - side)[:, None]
    mirror = torch.where(_uniform(n, generator=generator) < 0.5, -1.0, 1.0)
    crop = torch.zeros(n, 2, 3)
    crop[:, 0, 0], crop[:, 1, 1], crop[:, :, 2] = side * mirror, side, centre
    grid = F.affine_grid(crop, list(images.shape), align_corners=False).to(images)
    cropped = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    gain = 1 + GAIN * (2 * _uniform(n, 1, 1, 1, generator=generator) - 1)
    offset = OFFSET * (2 * _uniform(n, channels, 1, 1, generator=generator) - 1)
    return cropped * gain.to(images) + offset.to(images) * images.std()


def _uniform(*size: int, generator: torch.Generator) -> Tensor:
    return torch.rand(size, generator=generator)
