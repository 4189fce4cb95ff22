"""Statistics of a convolution's outputs without images, from white inputs and BatchNorm's running statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ghostify.fitting.bn_statistics import ChannelStats
from ghostify.fitting.depthwise_statistics import PerMapStatistics
from ghostify.fitting.lstsq import JointStatistics
from ghostify.graph.batchnorm import BatchNorm


def data_free_statistics(
    conv: nn.Conv2d,
    norm: BatchNorm | None,
    dw_size: int,
    *,
    inputs: ChannelStats | None = None,
    map_by_map: bool = False,
) -> JointStatistics | PerMapStatistics:
    """Statistics of a convolution under white inputs, with the running statistics of the following BatchNorm, if any.

    `inputs` holds the statistics of the convolution's input channels, where they are known.
    """
    return white_input_statistics(
        conv.weight.detach().float().cpu(),
        dw_size,
        input_variance=None if inputs is None or len(inputs.var) != conv.in_channels else inputs.var,
        stride=(conv.stride[0], conv.stride[1]),
        dilation=(conv.dilation[0], conv.dilation[1]),
        mean=None if norm is None or norm.running_mean is None else norm.running_mean.cpu(),
        variance=None if norm is None or norm.running_var is None else norm.running_var.cpu(),
        map_by_map=map_by_map,
    )


def white_input_statistics(
    weight: Tensor,
    dw_size: int,
    *,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    input_variance: Tensor | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    map_by_map: bool = False,
) -> JointStatistics | PerMapStatistics:
    """Statistics of a convolution (n x c x kh x kw) under independent inputs of `input_variance` (c, default 1).

    The outputs themselves are the basis. Outputs at a distance d share the filter taps in which their windows overlap.
    The actual `mean` and `variance` (n) of the outputs, where known, replace the mean 0 and the variance that follows
    from white inputs.
    """
    filters = weight.double()
    if input_variance is not None:
        filters = filters * input_variance.double().sqrt()[:, None, None]
    lags, n = _lag_covariances(filters, dw_size, stride, dilation), len(filters)
    if variance is not None:
        scale = (variance.double() / lags[0, 0].diagonal().clamp_min(1e-30)).sqrt()
        lags = {lag: products * scale[:, None] * scale for lag, products in lags.items()}
    taps = [(i, j) for i in range(dw_size) for j in range(dw_size)]
    centre = len(taps) // 2
    distances = [[(a - c, b - d) for c, d in taps] for a, b in taps]
    means = torch.zeros(n, dtype=torch.float64) if mean is None else mean.double()
    cross = torch.zeros(len(taps), n, n, dtype=torch.float64)
    for p, lag in enumerate(row[centre] for row in distances):
        if lag in lags:
            cross[p] = lags[lag]
    common: dict[str, Any] = {
        "cross": cross,
        "var": lags[0, 0].diagonal().clone(),
        "mean_v": means.expand(len(taps), n),
        "mean_y": means,
    }
    if map_by_map:
        zero = torch.zeros(n, dtype=torch.float64)
        variances = {lag: products.diagonal() for lag, products in lags.items()}
        auto = torch.stack([torch.stack([variances.get(lag, zero) for lag in row], 1) for row in distances], 1)
        return PerMapStatistics(auto=auto, **common)
    gram = torch.zeros(len(taps), n, len(taps), n, dtype=torch.float64)
    for p, row in enumerate(distances):
        for q, lag in enumerate(row):
            if lag in lags:
                gram[p, :, q] = lags[lag]
    basis = weight.double().permute(0, 2, 3, 1).flatten(1)
    return JointStatistics(gram=gram, basis=basis, initial_coordinates=torch.eye(n, dtype=torch.float64), **common)


def _lag_covariances(
    filters: Tensor, dw_size: int, stride: tuple[int, int], dilation: tuple[int, int]
) -> dict[tuple[int, int], Tensor]:
    """E[z_i(p + d) z_j(p)] for white inputs (n x n) by the distance d in output positions, where they are not 0.

    One matrix product over the filter taps that two windows share, for half of the distances; that of -d is the
    transpose of that of d. Windows share taps where their distance in input positions is a multiple of the dilation.
    """
    reach, (_, _, height, width) = dw_size - 1, filters.shape
    lags = {}
    for down, right in [(a, b) for a in range(reach + 1) for b in range(-reach, reach + 1) if (a, b) >= (0, 0)]:
        (y, y_rest), (x, x_rest) = divmod(down * stride[0], dilation[0]), divmod(right * stride[1], dilation[1])
        if y_rest or x_rest or y >= height or abs(x) >= width:
            continue
        later = filters[:, :, : height - y, max(0, -x) : width - max(0, x)].flatten(1)
        earlier = filters[:, :, y:, max(0, x) : width + min(0, x)].flatten(1)
        lags[down, right] = later @ earlier.T
        lags[-down, -right] = lags[down, right].T
    return lags
