"""Multiply-accumulates (one multiply-add is one MAC) and parameters of layers and models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ghostify.graph.inputs import CallArguments, as_arguments, call_model
from ghostify.graph.modes import eval_mode
from ghostify.graph.observation import MacCounter
from ghostify.graph.program import ConvCall, Convolution
from ghostify.modules.layout import GhostLayout


def total_positions(calls: Iterable[ConvCall]) -> int | None:
    """Output positions of all calls on all images, or None where a call has no shapes."""
    total = 0
    for call in calls:
        if call.output_positions is None:
            return None
        total += call.output_positions
    return total


def conv_macs(conv: Convolution) -> int:
    """MACs of the convolution for one output position."""
    return conv.outputs * conv.macs_per_output


def ghost_macs(conv: Convolution, layout: GhostLayout) -> int:
    """MACs of its ghost module for one output position: m c k^2 + (n - m) w d^2 (Han et al., 2020, section 3.1)."""
    return layout.intrinsic * conv.macs_per_output + layout.macs_per_position


def layer_parameters(macs_per_position: int, conv: Convolution) -> int:
    """Parameters of a convolution or its ghost module with so many MACs for one output position: one weight for each,
    and the bias."""
    return macs_per_position + conv.outputs * conv.bias


def count_parameters(module: nn.Module) -> int:
    """The number of parameters, each counted once."""
    return sum(p.numel() for p in module.parameters())


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """MACs of one forward in evaluation mode (see `MacCounter`); the mode is restored."""
    with eval_mode(model), MacCounter() as counter:
        call_model(model, CallArguments(*as_arguments(example_inputs)))
    return counter.macs
