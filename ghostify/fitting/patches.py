"""What a convolution sees, as rows for least squares: padding, patches, neighbourhoods; tensor maths only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from ghostify.graph.conv_types import padded_same

Positions = tuple[Tensor, Tensor, Tensor]


def flatten_filters(conv: nn.Conv2d) -> Tensor:
    """n x (kh kw c), float64: channels last, as patches are gathered."""
    return conv.weight.detach().double().cpu().permute(0, 2, 3, 1).flatten(1)


def unflatten_filters(filters: Tensor, conv: nn.Conv2d) -> Tensor:
    """The inverse of `flatten_filters`: n x (kh kw c) -> n x c x kh x kw."""
    kh, kw = conv.kernel_size[0], conv.kernel_size[1]
    return filters.reshape(len(filters), kh, kw, conv.in_channels).permute(0, 3, 1, 2)


def padded(conv: nn.Conv2d, image: Tensor) -> Tensor:
    """The input as the convolution pads it, whatever its padding and padding mode."""
    if isinstance(conv, Conv2dSame):
        return padded_same(conv, image)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    pad = conv._reversed_padding_repeated_twice
    return F.pad(image, pad, mode=mode) if any(pad) else image


def positions_per_map(limit: int, maps: int) -> int:
    """Positions of each of so many maps to look at, for near `limit` in all; at least one."""
    return max(1, -(-limit // maps))


def sample_positions(shape: torch.Size, share: int, seed: int) -> Positions:
    """Image, row and column of `share` random output positions of every image, or of all if there are no more."""
    count, _, height, width = shape
    if share >= height * width:
        flat = torch.arange(height * width).expand(count, -1)
    else:
        generator = torch.Generator().manual_seed(seed)
        flat = torch.rand(count, height * width, generator=generator).topk(share).indices.sort().values
    image = torch.arange(count)[:, None].expand_as(flat).flatten()
    return image, flat.flatten() // width, flat.flatten() % width


def gather_positions(maps: Tensor, places: Positions) -> Tensor:
    """P x n: the maps at the places."""
    return maps[places[0], :, places[1], places[2]]


def flatten_positions(maps: Tensor) -> Tensor:
    """P x n: the maps at every position."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def extract_patches(conv: nn.Conv2d, image: Tensor, places: Positions) -> Tensor:
    """What the convolution sees at output places: P x (kh kw c)."""
    index, row, column = places
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    flatten_positions = row[:, None] * stride[0] + torch.arange(kernel[0]) * dilation[0]
    columns = column[:, None] * stride[1] + torch.arange(kernel[1]) * dilation[1]
    last = padded(conv, image).permute(0, 2, 3, 1)
    return last[index[:, None, None], flatten_positions[:, :, None], columns[:, None, :]].flatten(1)


def unfold_neighbours(maps: Tensor, d: int) -> Tensor:
    """Each position's d x d neighbours, for maps that reach d // 2 beyond them: P x (d d) x b."""
    windows = maps.permute(0, 2, 3, 1).unfold(1, d, 1).unfold(2, d, 1)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, d * d, maps.shape[1])


@dataclass(frozen=True, eq=False)
class Crop:
    """A part of each image's outputs, H x W: what the convolution sees to make them and their neighbours, and targets.

    `padded_input` (N x c x h x w) is padded; `valid_mask` (N x 1 x (H + d - 1) x (W + d - 1)) is 1 where there is an
    output, 0 beyond the border; `target` is N x n x H x W.
    """

    padded_input: Tensor
    valid_mask: Tensor
    target: Tensor

    def __getitem__(self, images: Tensor | slice) -> Crop:
        return Crop(self.padded_input[images], self.valid_mask[images], self.target[images])

    def maps(self, conv: nn.Conv2d, filters: Tensor) -> Tensor:
        """The maps of other `filters` (b x kh kw c) in the convolution's place, zero beyond the border."""
        kernels = unflatten_filters(filters, conv).to(self.padded_input.dtype)
        return F.conv2d(self.padded_input, kernels, stride=conv.stride, dilation=conv.dilation) * self.valid_mask


def random_crop(conv: nn.Conv2d, image: Tensor, target: Tensor, side: int, d: int, seed: int) -> Crop:
    """A square of up to `side` x `side` outputs at random in each image, with the margin of a d x d cheap kernel."""
    generator, reach, count = torch.Generator().manual_seed(seed), d // 2, len(image)
    inputs, outputs, insides = [], [], []
    for axis, extent in enumerate(target.shape[2:]):
        length = min(side, extent)
        first = torch.randint(0, extent - length + 1, (count, 1), generator=generator)
        outputs.append(first + torch.arange(length))
        near = first + torch.arange(-reach, length + reach)
        insides.append((near >= 0) & (near < extent))
        size = (length - 1 + 2 * reach) * conv.stride[axis] + (conv.kernel_size[axis] - 1) * conv.dilation[axis] + 1
        inputs.append(first * conv.stride[axis] + torch.arange(size))
    margin = [reach * conv.stride[axis] for axis in (1, 1, 0, 0)]
    valid_mask = (insides[0][:, None, :, None] & insides[1][:, None, None, :]).to(image.dtype)
    return Crop(_cut(F.pad(padded(conv, image), margin), inputs), valid_mask, _cut(target, outputs))


def _cut(maps: Tensor, places: list[Tensor]) -> Tensor:
    """Rows places[0] (N x h) and columns places[1] (N x w) of each image."""
    index = torch.arange(len(maps))[:, None, None]
    return maps.permute(0, 2, 3, 1)[index, places[0][:, :, None], places[1][:, None, :]].permute(0, 3, 1, 2)
