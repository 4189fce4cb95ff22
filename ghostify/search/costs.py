"""The quantities that a budget limits.

To add one, write it as a `CountedCost`, or as a class with the members of `Cost`, and put it into `ROWS`: candidates,
budgets, the frontier, the command's help and the error messages read that table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

from torch import nn

from ghostify.graph.neighbours import following_norm_of
from ghostify.graph.program import Convolution, Program
from ghostify.modules.layout import GhostLayout
from ghostify.planning import cost
from ghostify.pruning.pruning_groups import PruningGroup, pruned_conv
from ghostify.timing.latency import Counts, interleaved_latency, layer_latency, model_latency, pruned_latency
from ghostify.timing.timer import LatencyTimer


class Cost(Protocol):
    """One quantity that a budget limits: as a share of the original's up to 1, as an absolute number above 1."""

    @property
    def name(self) -> str:
        """Its key in a budget."""

    @property
    def unit(self) -> str:
        """What the absolute number counts."""

    @property
    def is_measured(self) -> bool:
        """Whether it is measured on this machine: then sums over layers are estimates, and a layer is only rewritten
        where it becomes cheaper by a margin."""

    def of_program(self, program: Program, timer: LatencyTimer) -> float:
        """The cost of the original model."""

    def of_layouts(
        self, program: Program, conv: Convolution, layouts: Sequence[GhostLayout | None], timer: LatencyTimer
    ) -> list[float]:
        """The cost of a convolution in each layout (None: as it is), without its norm and activation."""

    def of_pruned(
        self, program: Program, conv: Convolution, kept_counts: Sequence[Counts], timer: LatencyTimer
    ) -> list[float]:
        """The cost of a convolution as it is, then of it with each pair of numbers of output and input channels."""

    def of_pruned_grid(
        self,
        program: Program,
        conv: Convolution,
        unpruned: float,
        out_counts: Sequence[int | None],
        in_counts: Sequence[int | None],
        timer: LatencyTimer,
    ) -> list[float]:
        """The cost of a convolution for all pairs of numbers of channels but the first pair, which costs `unpruned`.

        Both sequences begin with None: all channels.
        """

    def per_channel(self, program: Program, group: PruningGroup) -> float:
        """What norms and activations cost for each channel of a group."""

    def per_copied_map(self, program: Program, conv: Convolution) -> float:
        """What the copied norm of a ghost module costs for each intrinsic map that its ghosts read activated."""

    def share_of_model(self, program: Program, module: nn.Module, timer: LatencyTimer) -> float:
        """The rewritten model's share of the original's cost."""


def _norm_parameters(program: Program, conv: Convolution) -> int:
    """Parameters that the norm following a convolution has for each map."""
    norm = following_norm_of(program, conv)
    if norm is None:
        return 0
    return cost.count_parameters(program.subgraphs[conv.subgraph_path].get_submodule(norm)) // conv.outputs


def _channel_parameters(program: Program, group: PruningGroup) -> int:
    """Parameters that norms and activations have for each channel of a group."""
    parameters = dict(program.subgraphs[group.subgraph_path].named_parameters())
    return sum(member.path in parameters for member in group.channels.parameters)


def _layer_macs(conv: Convolution, layout: GhostLayout | None) -> int:
    return _macs_per_position(conv, layout) * (cost.total_positions(conv.calls) or 0)


def _layer_parameters(conv: Convolution, layout: GhostLayout | None) -> int:
    return cost.layer_parameters(_macs_per_position(conv, layout), conv)


def _macs_per_position(conv: Convolution, layout: GhostLayout | None) -> int:
    return cost.conv_macs(conv) if layout is None else cost.ghost_macs(conv, layout)


@dataclass(frozen=True)
class CountedCost:
    """A cost that follows from shapes: exact, and the same on every machine."""

    name: str
    unit: str
    of_original: Callable[[Program], int]
    of_model: Callable[[nn.Module, Any], int]
    of_layer: Callable[[Convolution, GhostLayout | None], int]
    channel_count: Callable[[Program, PruningGroup], int] | None = None
    copied_map_count: Callable[[Program, Convolution], int] | None = None
    is_measured: bool = False

    def of_program(self, program: Program, _timer: LatencyTimer) -> float:
        return float(self.of_original(program))

    def of_layouts(
        self, _program: Program, conv: Convolution, layouts: Sequence[GhostLayout | None], _timer: LatencyTimer
    ) -> list[float]:
        return [float(self.of_layer(conv, layout)) for layout in layouts]

    def of_pruned(
        self, _program: Program, conv: Convolution, kept_counts: Sequence[Counts], _timer: LatencyTimer
    ) -> list[float]:
        return [
            float(self.of_layer(form, None)) for form in (conv, *(pruned_conv(conv, *counts) for counts in kept_counts))
        ]

    def of_pruned_grid(
        self,
        program: Program,
        conv: Convolution,
        _unpruned: float,
        out_counts: Sequence[int | None],
        in_counts: Sequence[int | None],
        timer: LatencyTimer,
    ) -> list[float]:
        return self.of_pruned(program, conv, list(product(out_counts, in_counts))[1:], timer)[1:]

    def per_channel(self, program: Program, group: PruningGroup) -> float:
        return 0.0 if self.channel_count is None else float(self.channel_count(program, group))

    def per_copied_map(self, program: Program, conv: Convolution) -> float:
        return 0.0 if self.copied_map_count is None else float(self.copied_map_count(program, conv))

    def share_of_model(self, program: Program, module: nn.Module, timer: LatencyTimer) -> float:
        return self.of_model(module, program.example) / self.of_program(program, timer)


@dataclass(frozen=True)
class LatencyCost:
    """Milliseconds of the inference form on this machine, norms and activations folded into their convolutions."""

    name: str = "latency"
    unit: str = "milliseconds"
    is_measured: bool = True

    def of_program(self, program: Program, timer: LatencyTimer) -> float:
        return model_latency(program, timer)

    def of_layouts(
        self, program: Program, conv: Convolution, layouts: Sequence[GhostLayout | None], timer: LatencyTimer
    ) -> list[float]:
        return layer_latency(program.conv(conv.name), conv, layouts, timer)

    def of_pruned(
        self, program: Program, conv: Convolution, kept_counts: Sequence[Counts], timer: LatencyTimer
    ) -> list[float]:
        return pruned_latency(program.conv(conv.name), conv, kept_counts, timer)

    def of_pruned_grid(
        self,
        program: Program,
        conv: Convolution,
        unpruned: float,
        out_counts: Sequence[int | None],
        in_counts: Sequence[int | None],
        timer: LatencyTimer,
    ) -> list[float]:
        """Estimated: pruning outputs and pruning inputs each save their share of the other's latency."""
        kept_counts: list[Counts] = [*((count, None) for count in out_counts), *((None, count) for count in in_counts)]
        kept_counts = list(dict.fromkeys(kept_counts))
        latencies_ms = dict(zip(kept_counts, self.of_pruned(program, conv, kept_counts[1:], timer), strict=True))
        shares = [
            latencies_ms[out_count, None] * latencies_ms[None, in_count] / latencies_ms[None, None] ** 2
            for out_count, in_count in product(out_counts, in_counts)
        ]
        return [unpruned * share for share in shares[1:]]

    def per_channel(self, _program: Program, _group: PruningGroup) -> float:
        return 0.0

    def per_copied_map(self, _program: Program, _conv: Convolution) -> float:
        return 0.0

    def share_of_model(self, program: Program, module: nn.Module, timer: LatencyTimer) -> float:
        before, after = interleaved_latency([program.module, module], program.example, timer)
        return after / before


ROWS: tuple[Cost, ...] = (
    CountedCost("macs", "multiply-accumulates", lambda program: program.macs or 0, cost.count_macs, _layer_macs),
    CountedCost(
        "params",
        "parameters",
        lambda program: cost.count_parameters(program.module),
        lambda module, _example: cost.count_parameters(module),
        _layer_parameters,
        _channel_parameters,
        _norm_parameters,
    ),
    LatencyCost(),
)
COSTS: Mapping[str, Cost] = {entry.name: entry for entry in ROWS}


def budget_help() -> str:
    """The costs that a budget can limit, for the help of an option."""
    names = [f"{entry.name}=0.5 ({entry.unit})" for entry in COSTS.values()]
    return f"{', '.join(names[:-1])} or {names[-1]}: up to 1 a share of the original's, above 1 a number"
