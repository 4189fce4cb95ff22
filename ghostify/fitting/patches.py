"""Patches, crops and neighbourhoods as regression rows; tensor maths only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from ghostify.graph.conv_types import padded_same

Positions = tuple[Tensor, Tensor, Tensor]


def flatten_filters(conv: nn.Conv2d) -> Tensor:
    """The filters of a convolution as n x (kh kw c), float64; channels last, as in patches."""
    return conv.weight.detach().double().cpu().permute(0, 2, 3, 1).flatten(1)


def unflatten_filters(filters: Tensor, conv: nn.Conv2d) -> Tensor:
    """The inverse of `flatten_filters`: n x (kh kw c) -> n x c x kh x kw."""
    kh, kw = conv.kernel_size[0], conv.kernel_size[1]
    return filters.reshape(len(filters), kh, kw, conv.in_channels).permute(0, 3, 1, 2)


def padded(conv: nn.Conv2d, image: Tensor) -> Tensor:
    """The input with the padding of the convolution, for every padding mode."""
    if isinstance(conv, Conv2dSame):
        return padded_same(conv, image)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    pad = conv._reversed_padding_repeated_twice
    return F.pad(image, pad, mode=mode) if any(pad) else image


def positions_per_map(limit: int, maps: int) -> int:
    """Number of positions to sample in each of so many maps, for about `limit` in total; at least one."""
    return max(1, -(-limit // maps))


def sample_positions(shape: torch.Size, count_per_image: int, seed: int) -> Positions:
    """Image, row and column of `count_per_image` random output positions per image, or of all if there are fewer."""
    images, _, height, width = shape
    if count_per_image >= height * width:
        flat = torch.arange(height * width).expand(images, -1)
    else:
        generator = torch.Generator().manual_seed(seed)
        flat = torch.rand(images, height * width, generator=generator).topk(count_per_image).indices.sort().values
    image = torch.arange(images)[:, None].expand_as(flat).flatten()
    return image, flat.flatten() // width, flat.flatten() % width


def gather_positions(maps: Tensor, positions: Positions) -> Tensor:
    """The maps at some positions (P x n)."""
    return maps[positions[0], :, positions[1], positions[2]]


def flatten_positions(maps: Tensor) -> Tensor:
    """The maps at every position (P x n)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def extract_patches(conv: nn.Conv2d, image: Tensor, positions: Positions) -> Tensor:
    """The input patches of the convolution at some output positions: P x (kh kw c)."""
    index, row, column = positions
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    rows = row[:, None] * stride[0] + torch.arange(kernel[0]) * dilation[0]
    columns = column[:, None] * stride[1] + torch.arange(kernel[1]) * dilation[1]
    channels_last = padded(conv, image).permute(0, 2, 3, 1)
    return channels_last[index[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1)


def unfold_neighbours(maps: Tensor, d: int) -> Tensor:
    """The d x d neighbours of each position, for maps with a margin of d // 2: P x (d d) x b."""
    windows = maps.permute(0, 2, 3, 1).unfold(1, d, 1).unfold(2, d, 1)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, d * d, maps.shape[1])


@dataclass(frozen=True, eq=False)
class Crop:
    """A crop of H x W outputs of each image: their targets, and the inputs of these outputs and their neighbours.

    `padded_input` (N x c x h x w) includes the padding; `valid_mask` (N x 1 x (H + d - 1) x (W + d - 1)) is 1 inside
    the output map and 0 outside; `target` is N x n x H x W.
    """

    padded_input: Tensor
    valid_mask: Tensor
    target: Tensor

    def __getitem__(self, images: Tensor | slice) -> Crop:
        return Crop(self.padded_input[images], self.valid_mask[images], self.target[images])

    def maps(self, conv: nn.Conv2d, filters: Tensor) -> Tensor:
        """The maps of `filters` (b x kh kw c) in place of those of the convolution; zero outside the output map."""
        kernels = unflatten_filters(filters, conv).to(self.padded_input.dtype)
        return F.conv2d(self.padded_input, kernels, stride=conv.stride, dilation=conv.dilation) * self.valid_mask


def random_crop(conv: nn.Conv2d, image: Tensor, target: Tensor, side: int, d: int, seed: int) -> Crop:
    """A random square of up to `side` x `side` outputs of each image, with the margin of a d x d cheap kernel."""
    generator, margin, count = torch.Generator().manual_seed(seed), d // 2, len(image)
    inputs, outputs, is_valid = [], [], []
    for axis, extent in enumerate(target.shape[2:]):
        length = min(side, extent)
        first = torch.randint(0, extent - length + 1, (count, 1), generator=generator)
        outputs.append(first + torch.arange(length))
        neighbours = first + torch.arange(-margin, length + margin)
        is_valid.append((neighbours >= 0) & (neighbours < extent))
        size = (length - 1 + 2 * margin) * conv.stride[axis] + (conv.kernel_size[axis] - 1) * conv.dilation[axis] + 1
        inputs.append(first * conv.stride[axis] + torch.arange(size))
    input_margins = [margin * conv.stride[axis] for axis in (1, 1, 0, 0)]
    valid_mask = (is_valid[0][:, None, :, None] & is_valid[1][:, None, None, :]).to(image.dtype)
    return Crop(_select(F.pad(padded(conv, image), input_margins), inputs), valid_mask, _select(target, outputs))


def _select(maps: Tensor, positions: list[Tensor]) -> Tensor:
    """Rows positions[0] (N x h) and columns positions[1] (N x w) of each image."""
    index = torch.arange(len(maps))[:, None, None]
    return maps.permute(0, 2, 3, 1)[index, positions[0][:, :, None], positions[1][:, None, :]].permute(0, 3, 1, 2)
