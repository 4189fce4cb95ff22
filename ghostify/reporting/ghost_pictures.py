"""Pictures of ghost maps next to the intrinsic map that each comes from, and the original's map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghostify.errors import GhostifyError
from ghostify.modules.ghost import GhostModule
from ghostify.reporting.feature_maps import ghost_outputs, layer_outputs, map_errors
from ghostify.reporting.images import data_uri, grey_tile
from ghostify.summary import LayerReport

GHOSTS_SHOWN = 6
KERNEL_SIDE = 56


@dataclass(frozen=True)
class GhostPicture:
    """One ghost map of the first image. Channels are the original's; `error` is relative, over all images.

    The pictures are data URIs: the intrinsic map with the largest kernel norm for this ghost, the ghost, the original's
    map, and the kernel on that intrinsic map; kernels of one pixel are shown for all intrinsic maps. Ghost and original
    have the same grey scale and mean.
    """

    channel: int
    source: int
    error: float
    intrinsic: str
    ghost: str
    original: str
    kernel: str


@dataclass(frozen=True)
class LayerPictures:
    """Some ghosts of a layer, the smallest error first and evenly spaced by rank, and the errors of all its ghosts."""

    layer: str
    ghosts: tuple[GhostPicture, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class _LayerMaps:
    """Outputs of the converted layer, with the original's mean, and of the original (N x n x H x W), and all kernels
    (ghosts x m x d x d)."""

    layer: LayerReport
    converted: Tensor
    original: Tensor
    kernels: Tensor

    def picture(self, ghost: int, error: float) -> GhostPicture:
        """The pictures of a ghost, counted in the order of the ghost module."""
        kernels, intrinsic = self.kernels[ghost], self.layer.channels[: self.layer.intrinsic]
        channel, strongest = self.layer.channels[len(intrinsic) + ghost], int(kernels.flatten(1).norm(dim=1).argmax())
        source_map = self.converted[0, intrinsic[strongest]]
        ghost_map, original_map = self.converted[0, channel], self.original[0, channel]
        return GhostPicture(
            channel,
            intrinsic[strongest],
            error,
            intrinsic=data_uri(grey_tile(source_map, source_map)),
            ghost=data_uri(grey_tile(ghost_map, original_map)),
            original=data_uri(grey_tile(original_map, original_map)),
            kernel=_kernel_picture(kernels[strongest] if kernels.shape[-1] > 1 else _as_square(kernels.flatten())),
        )


def is_picturable(module: nn.Module, original: nn.Module, layer: LayerReport) -> bool:
    """Whether a layer is a ghost module that computes all maps of a module of the original."""
    converted, replaced = (dict(m.named_modules()).get(layer.name) for m in (module, original))
    return isinstance(converted, GhostModule) and replaced is not None and len(layer.channels) == layer.weight_shape[0]


def picture_ghosts(
    module: nn.Module, original: nn.Module, layer: LayerReport, batches: Sequence[Any], count: int = GHOSTS_SHOWN
) -> LayerPictures:
    """At most `count` ghosts of a converted model's layer next to the original's maps on images.

    Raises `GhostifyError` for a layer without ghosts, or whose ghost module does not compute all the original's maps.
    """
    if not is_picturable(module, original, layer):
        raise GhostifyError(
            f"{layer.name}: is not a ghost module that computes all maps of the original's layer. "
            "Choose a layer with ghosts and without pruning."
        )
    original_maps = layer_outputs(original, layer.name, batches)
    ghost_maps = ghost_outputs(module, layer.name, batches, layer.channels)
    errors = map_errors(ghost_maps, original_maps)
    ghost_maps = ghost_maps + (original_maps - ghost_maps).mean((0, 2, 3), keepdim=True)  # as the following norm does
    ghost_module = module.get_submodule(layer.name)
    assert isinstance(ghost_module, GhostModule)
    maps = _LayerMaps(layer, ghost_maps, original_maps, cheap_kernels(ghost_module))
    ghost_errors = [float(errors[channel]) for channel in layer.channels[layer.intrinsic :]]
    ranking = sorted(range(len(ghost_errors)), key=lambda ghost: ghost_errors[ghost])
    ranks = torch.linspace(0, len(ranking) - 1, min(count, len(ranking))).round().int().tolist()
    chosen = [ranking[rank] for rank in dict.fromkeys(ranks)]
    pictures = tuple(maps.picture(ghost, ghost_errors[ghost]) for ghost in chosen)
    return LayerPictures(layer.name, pictures, tuple(ghost_errors))


def _kernel_picture(kernel: Tensor) -> str:
    """A kernel (d x d) as a data URI; grey is zero."""
    largest = kernel.abs().max()
    return data_uri(grey_tile(kernel, torch.stack((-largest, largest)), KERNEL_SIDE))


def _as_square(weights: Tensor) -> Tensor:
    """The weights of one-pixel kernels row by row in a square, padded with zeros."""
    side = math.ceil(len(weights) ** 0.5)
    return F.pad(weights, (0, side**2 - len(weights))).reshape(side, side)


def cheap_kernels(ghost: GhostModule) -> Tensor:
    """The kernel of each ghost on each intrinsic map in the cheap operation (ghosts x m x d x d); zero where unused."""
    m, d = ghost.primary_conv.out_channels, ghost.cheap_convs[0].kernel_size[0]
    kernels_by_conv = []
    for conv, (start, _) in zip(ghost.cheap_convs, ghost.cheap_ranges, strict=True):
        kernels = torch.zeros(conv.out_channels, m, d, d)
        width, ghosts_per_group = conv.weight.shape[1], conv.out_channels // conv.groups
        for j, kernel in enumerate(conv.weight.detach().float().cpu()):
            first = start + (j // ghosts_per_group) * width
            kernels[j, first : first + width] = kernel
        kernels_by_conv.append(kernels)
    return torch.cat(kernels_by_conv)
