"""The simulated changes of convolutions that candidates and plans stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ghostify.fitting.assignment import GhostAssignment
from ghostify.graph.program import Program
from ghostify.modules.layout import Depthwise, GhostLayout
from ghostify.planning.planner import GhostRewrite, Plan
from ghostify.pruning.kept_channels import KeptChannels
from ghostify.pruning.pruning_groups import PruningGroup, kept_by_conv


@dataclass(frozen=True, eq=False)
class ConvChange:
    """The simulated change of one convolution or linear layer: the inputs that are kept (None: all), and the layout of
    its outputs `kept_out` (None: all). Forms that assign ghosts to maps need the `assignment`."""

    name: str
    kept_in: tuple[int, ...] | None = None
    layout: GhostLayout | None = None
    kept_out: tuple[int, ...] | None = None
    assignment: GhostAssignment | None = None

    @property
    def has_kernels(self) -> bool:
        """Whether its ghosts are computed by kernels, from one assigned map each."""
        return self.layout is not None and isinstance(self.layout.form, Depthwise) and not self.layout.is_low_rank


ModelChange = tuple[ConvChange, ...]


def change_of_group(program: Program, group: PruningGroup, kept: tuple[int, ...]) -> ModelChange:
    """The change of every convolution and linear layer that reads the channels of a group which keeps these."""
    names = {conv.name for conv in (*program.convolutions, *program.linear_layers) if conv.groups == 1}
    pruned = kept_by_conv(program, {group: kept})
    return tuple(ConvChange(name, k.kept_in) for name, k in pruned.items() if name in names and k.kept_in is not None)


def change_of_plan(plan: Plan, assignments: Mapping[str, GhostAssignment]) -> ModelChange:
    """The change that a plan makes as a whole; `assignments` are those of convolutions with assigned ghosts."""
    changes = []
    for entry in plan.changes:
        kept = entry.kept_channels or KeptChannels()
        kept_in = kept.kept_in if entry.conv.groups == 1 else None
        layout = entry.layout if isinstance(entry, GhostRewrite) else None
        if kept_in is not None or layout is not None:
            name = entry.conv.name
            changes.append(ConvChange(name, kept_in, layout, kept.kept_out, assignments.get(name)))
    return tuple(changes)
