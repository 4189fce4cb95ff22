"""What a convolution sees, as rows for least squares: padding, patches, neighbourhoods; tensor maths only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Places = tuple[Tensor, Tensor, Tensor]


def filters_of(conv: nn.Conv2d) -> Tensor:
    """n x (kh kw c), float64: channels last, as patches are gathered."""
    return conv.weight.detach().double().cpu().permute(0, 2, 3, 1).flatten(1)


def as_kernels(filters: Tensor, conv: nn.Conv2d) -> Tensor:
    """The inverse of `filters_of`: n x (kh kw c) -> n x c x kh x kw."""
    kh, kw = conv.kernel_size[0], conv.kernel_size[1]
    return filters.reshape(len(filters), kh, kw, conv.in_channels).permute(0, 3, 1, 2)


def padded(conv: nn.Conv2d, image: Tensor) -> Tensor:
    """The input as the convolution pads it, whatever its padding and padding mode."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    pad = conv._reversed_padding_repeated_twice
    return F.pad(image, pad, mode=mode) if any(pad) else image


def respond(conv: nn.Conv2d, image: Tensor, filters: Tensor) -> Tensor:
    """The maps of other `filters` (b x kh kw c) in the convolution's place, without bias: N x b x H' x W'."""
    kernels = as_kernels(filters, conv).to(image.dtype)
    return F.conv2d(padded(conv, image), kernels, stride=conv.stride, dilation=conv.dilation)


def choose_places(shape: torch.Size, share: int, seed: int) -> Places:
    """Image, row and column of `share` random output positions of every image, or of all if there are no more."""
    count, _, height, width = shape
    if share >= height * width:
        flat = torch.arange(height * width).expand(count, -1)
    else:
        generator = torch.Generator().manual_seed(seed)
        flat = torch.rand(count, height * width, generator=generator).topk(share).indices.sort().values
    image = torch.arange(count)[:, None].expand_as(flat).flatten()
    return image, flat.flatten() // width, flat.flatten() % width


def values(maps: Tensor, places: Places) -> Tensor:
    """P x n: the maps at the places."""
    return maps[places[0], :, places[1], places[2]]


def patches(conv: nn.Conv2d, image: Tensor, places: Places) -> Tensor:
    """What the convolution sees at output places: P x (kh kw c)."""
    index, row, column = places
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    rows = row[:, None] * stride[0] + torch.arange(kernel[0]) * dilation[0]
    columns = column[:, None] * stride[1] + torch.arange(kernel[1]) * dilation[1]
    last = padded(conv, image).permute(0, 2, 3, 1)
    return last[index[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1)


def neighbourhoods(maps: Tensor, places: Places, d: int) -> Tensor:
    """The maps at the d x d places around each output place, zero outside: P x (d d) x b."""
    index, row, column = places
    last = F.pad(maps, (d // 2,) * 4).permute(0, 2, 3, 1)
    rows, columns = row[:, None] + torch.arange(d), column[:, None] + torch.arange(d)
    return last[index[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1, 2)
