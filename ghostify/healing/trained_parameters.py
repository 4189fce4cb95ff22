"""The parameters that healing trains, with their learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ghostify.graph.call_hooks import on_calls

FROZEN_SHARE = 0.02


def trained_parameters(model: nn.Module, run: Callable[[nn.Module], Any], rate: float) -> list[tuple[Tensor, float]]:
    """The parameters in the order in which `run` uses them, without the first `FROZEN_SHARE` of their values.

    The first layers of a network have few parameters and large maps, so that most of a step's time is for their
    gradients. Rates are `rate` times the root mean square of a weight; for biases times the size of an output for
    inputs of size one. Parameters that are 0, or have no floating point, are not trained.
    """
    order: dict[nn.Module, None] = {}
    with on_calls(model.modules(), after=lambda module, _: order.setdefault(module)):
        run(model)
    rates: dict[Tensor, float] = {}
    for module in order:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point():
                rates.setdefault(parameter, rate * _size(module, name, parameter))
    total, used = sum(p.numel() for p in rates), 0
    trained = list[tuple[Tensor, float]]()
    for values, values_rate in rates.items():
        if used >= FROZEN_SHARE * total and values_rate > 0:
            trained.append((values, values_rate))
        used += values.numel()
    return trained


def _size(module: nn.Module, name: str, parameter: Tensor) -> float:
    """The root mean square of a parameter; for a bias that of outputs for inputs of size one."""
    weight = module._parameters.get("weight")
    if name == "bias" and weight is not None:
        return _root_mean_square(weight) * math.sqrt(weight[0].numel())
    return _root_mean_square(parameter)


def _root_mean_square(values: Tensor) -> float:
    return float(values.detach().float().square().mean().sqrt())
