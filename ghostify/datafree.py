"""Moments without images: what white inputs and BatchNorm's running statistics say about a convolution's outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ghostify.lstsq import Statistics
from ghostify.pairs import MapStatistics
from ghostify.propagate import Channels


def statistics_of(
    conv: nn.Conv2d, norm: Any, dw_size: int, *, inputs: Channels | None = None, map_by_map: bool = False
) -> Statistics | MapStatistics:
    """Statistics of a convolution under white inputs, with the running statistics of the BatchNorm behind, if any.

    `inputs` says what is known of the convolution's input channels.
    """
    return white_statistics(
        conv.weight.detach().float().cpu(),
        dw_size,
        input_variance=None if inputs is None or len(inputs.var) != conv.in_channels else inputs.var,
        stride=(conv.stride[0], conv.stride[1]),
        dilation=(conv.dilation[0], conv.dilation[1]),
        mean=None if norm is None else norm.running_mean.cpu(),
        variance=None if norm is None else norm.running_var.cpu(),
        map_by_map=map_by_map,
    )


def white_statistics(
    weight: Tensor,
    dw_size: int,
    *,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    input_variance: Tensor | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    map_by_map: bool = False,
) -> Statistics | MapStatistics:
    """Statistics of a convolution (n x c x kh x kw) under independent inputs of `input_variance` (c, default 1).

    The outputs themselves are the basis. Outputs d apart share the taps in which their windows overlap. The outputs'
    own `mean` and `variance` (n), where known, replace the mean 0 and the variance that white inputs give.
    """
    filters = weight.double()
    if input_variance is not None:
        filters = filters * input_variance.double().sqrt()[:, None, None]
    lags, n, reach = _lags(filters, dw_size, stride, dilation), len(filters), dw_size - 1
    if variance is not None:
        own = lags[:, :, reach, reach].diagonal()
        scale = (variance.double() / own.clamp_min(1e-30)).sqrt()
        lags = lags * torch.outer(scale, scale)[:, :, None, None]
    places = [(i, j) for i in range(dw_size) for j in range(dw_size)]
    means = torch.zeros(n, dtype=torch.float64) if mean is None else mean.double()
    common: dict[str, Any] = {
        "cross": torch.stack([lags[:, :, a + reach - reach // 2, b + reach - reach // 2] for a, b in places]),
        "var": lags[:, :, reach, reach].diagonal().clone(),
        "mean_v": means.expand(len(places), n),
        "mean_y": means,
    }
    if map_by_map:
        own = lags.diagonal(dim1=0, dim2=1)
        rows = [[own[a - c + reach, b - d + reach] for c, d in places] for a, b in places]
        auto = torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)
        return MapStatistics(auto=auto, **common)
    gram = torch.empty(len(places), n, len(places), n, dtype=torch.float64)
    for p, (a, b) in enumerate(places):
        for q, (c, d) in enumerate(places):
            gram[p, :, q] = lags[:, :, a - c + reach, b - d + reach]
    basis = weight.double().permute(0, 2, 3, 1).flatten(1)
    return Statistics(gram=gram, basis=basis, start=torch.eye(n, dtype=torch.float64), **common)


def _lags(filters: Tensor, dw_size: int, stride: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """E[z_i(p + d) z_j(p)] for white inputs: n x n x (2 dw_size - 1)^2, d counted in output positions.

    One matrix product over the taps that two windows share, for each of half the distances: -d is the transpose of d.
    Windows share taps where their distance in input positions is a multiple of the dilation.
    """
    reach, (n, _, height, width) = dw_size - 1, filters.shape
    lags = filters.new_zeros(n, n, 2 * reach + 1, 2 * reach + 1)
    for down, right in [(a, b) for a in range(reach + 1) for b in range(-reach, reach + 1) if (a, b) >= (0, 0)]:
        (y, between), (x, beside) = divmod(down * stride[0], dilation[0]), divmod(right * stride[1], dilation[1])
        if between or beside or y >= height or abs(x) >= width:
            continue
        later = filters[:, :, : height - y, max(0, -x) : width - max(0, x)].flatten(1)
        earlier = filters[:, :, y:, max(0, x) : width + min(0, x)].flatten(1)
        product = later @ earlier.T
        lags[:, :, reach + down, reach + right] = product
        lags[:, :, reach - down, reach - right] = product.T
    return lags
