"""BatchNorm's statistics of compressed models: re-estimated on the calibration images where that is better."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.lib.networks import reestimated
from benchmarks.lib.rivals import CalibrationImages, Compression
from ghostify.graph.inputs import tensor_leaves
from ghostify.graph.modes import eval_mode

Compressor = Callable[[nn.Module, CalibrationImages], Compression]


def renormalised(compressor: Compressor) -> Compressor:
    """A compressor whose models have the better BatchNorm statistics."""

    def build(model: nn.Module, calibration: CalibrationImages) -> Compression:
        compress = compressor(model, calibration)
        return lambda ratio: with_better_statistics(compress(ratio), model, calibration)

    return build


def with_better_statistics(small: nn.Module, model: nn.Module, calibration: CalibrationImages) -> nn.Module:
    """The model as it is or with re-estimated statistics: the one nearer to the original on the calibration images."""

    def outputs(m: nn.Module) -> Tensor:
        with eval_mode(m):
            return torch.cat([tensor_leaves(m(batch))[0] for batch in calibration.batches])

    reference = outputs(model)
    candidates = reestimated(small, calibration.batches), small
    return min(candidates, key=lambda m: float((outputs(m) - reference).square().sum()))
