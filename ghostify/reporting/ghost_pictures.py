"""Intrinsic maps, their ghosts and the originals side by side, as pictures: for a page, or to look at."""

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

GHOSTS = 6
KERNEL_SIDE = 56


@dataclass(frozen=True)
class GhostPicture:
    """One ghost map of the first image. Channels are the original's; `error` is relative, over all images.

    Pictures are data addresses: the intrinsic map that weighs most in the ghost, the ghost, what the original makes,
    and the kernel on that intrinsic map, or, where kernels are one pixel, those on all of them. Ghost and original
    share one scale of greys and one mean.
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
    """Some ghosts of a layer, the best first, evenly spread over their errors; and the errors of all of them."""

    layer: str
    ghosts: tuple[GhostPicture, ...]
    errors: tuple[float, ...]


def is_picturable(module: nn.Module, original: nn.Module, line: LayerReport) -> bool:
    """Whether a line is of a ghost module that makes all maps of the module that the original has there."""
    found = [dict(m.named_modules()).get(line.name) for m in (module, original)]
    return isinstance(found[0], GhostModule) and found[1] is not None and len(line.channels) == line.weight_shape[0]


def picture_ghosts(
    module: nn.Module, original: nn.Module, line: LayerReport, batches: Sequence[Any], count: int = GHOSTS
) -> LayerPictures:
    """Ghosts of a converted model's layer beside the original's maps on images; `GhostifyError` if there are none."""
    if not is_picturable(module, original, line):
        raise GhostifyError(f"{line.name}: is no ghost module that makes all maps of a module of the original's")
    wanted = layer_outputs(original, line.name, batches)
    made = ghost_outputs(module, line.name, batches, line.channels)
    errors = map_errors(made, wanted)
    made = made + (wanted - made).mean((0, 2, 3), keepdim=True)  # constants that the norm behind holds
    own, ghosts = line.channels[: line.intrinsic], line.channels[line.intrinsic :]
    ranked = sorted(range(len(ghosts)), key=lambda j: float(errors[ghosts[j]]))
    places = torch.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().int().tolist()
    ghost = module.get_submodule(line.name)
    assert isinstance(ghost, GhostModule)
    kernels = kernels_of(ghost)
    shown = []
    for j in (ranked[k] for k in dict.fromkeys(places)):
        channel, strongest = ghosts[j], int(kernels[j].flatten(1).norm(dim=1).argmax())
        maps = (made[0, own[strongest]], made[0, channel], wanted[0, channel])
        scales = (maps[0], wanted[0, channel], wanted[0, channel])
        pictures = [data_uri(grey_tile(m, s)) for m, s in zip(maps, scales, strict=True)]
        kernel = kernels[j, strongest] if kernels.shape[-1] > 1 else _squared(kernels[j].flatten())
        pictures.append(
            data_uri(grey_tile(kernel, torch.stack((-kernel.abs().max(), kernel.abs().max())), KERNEL_SIDE))
        )
        shown.append(GhostPicture(channel, own[strongest], float(errors[channel]), *pictures))
    return LayerPictures(line.name, tuple(shown), tuple(float(errors[c]) for c in ghosts))


def _squared(weights: Tensor) -> Tensor:
    """One-pixel kernels on all intrinsic maps, row by row in a square."""
    side = math.ceil(len(weights) ** 0.5)
    return F.pad(weights, (0, side**2 - len(weights))).reshape(side, side)


def kernels_of(ghost: GhostModule) -> Tensor:
    """The cheap operation's weights, as every ghost's kernel on every intrinsic map (ghosts x m x d x d)."""
    m, d = ghost.primary_conv.out_channels, ghost.cheap_convs[0].kernel_size[0]
    parts = []
    for conv, (start, _) in zip(ghost.cheap_convs, ghost.cheap_ranges, strict=True):
        whole = torch.zeros(conv.out_channels, m, d, d)
        width, each = conv.weight.shape[1], conv.out_channels // conv.groups
        for j, kernel in enumerate(conv.weight.detach().float().cpu()):
            first = start + (j // each) * width
            whole[j, first : first + width] = kernel
        parts.append(whole)
    return torch.cat(parts)
