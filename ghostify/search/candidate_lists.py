"""The candidates of all layers and channel groups, list by list, and the constraints between the lists."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from ghostify.fitting.sensitivity import PreparedCalibration
from ghostify.graph.program import Convolution, Program
from ghostify.planning.planner import PlanTarget
from ghostify.search.candidates import Candidate, dense_candidates, group_candidates, layer_candidates
from ghostify.search.group_statistics import GroupStatistics
from ghostify.search.layer_statistics import compute_layer_statistics
from ghostify.search.solver import Constraint, GroupConstraint, GroupRange, SumConstraint
from ghostify.timing.timer import LatencyTimer

SUM_STEPS = 8
KEPT_OUT, KEPT_IN = "kept_out_count", "kept_in_count"

ListKey = tuple[int, str]  # the number of a layer's list, and the field of its candidates that a constraint limits


def group_lists(
    program: Program,
    layers: Sequence[Convolution],
    group_statistics: Sequence[GroupStatistics],
    keys: tuple[str, ...],
    timer: LatencyTimer,
) -> tuple[list[list[Candidate]], dict[ListKey, Constraint]]:
    """The candidates of each group, whose lists follow those of the layers, and the constraints of the layers."""
    numbers = {layer.name: k for k, layer in enumerate(layers)}
    lists, ranges = list[list[Candidate]](), defaultdict[ListKey, list[GroupRange]](list)
    for number, statistics in enumerate(group_statistics, len(layers)):
        group = statistics.group
        fixed = [member for member in group.members if member.conv.name not in numbers]
        lists.append(group_candidates(program, statistics, fixed, keys, timer))
        for member in (m for m in group.members if m.conv.name in numbers):
            per_channel = {KEPT_OUT: member.outputs_per_channel, KEPT_IN: member.inputs_per_channel}
            for key, count in per_channel.items():
                if count:
                    ranges[numbers[member.conv.name], key].append(GroupRange(number, count, group.size))
    return lists, {(k, key): _constraint(layers[k], k, key, parts) for (k, key), parts in ranges.items()}


def _constraint(layer: Convolution, number: int, key: str, ranges: Sequence[GroupRange]) -> Constraint:
    total, first = layer.outputs if key == KEPT_OUT else layer.inputs, ranges[0]
    if len(ranges) > 1:
        return SumConstraint(number, key, total, tuple(ranges))
    return GroupConstraint(number, first.group, key, first.per_channel, total - first.per_channel * first.size)


def layer_lists(
    program: Program,
    targets: Sequence[PlanTarget],
    layers: Sequence[Convolution],
    of_groups: Sequence[list[Candidate]],
    constraints: Mapping[ListKey, Constraint],
    calibration: PreparedCalibration | None,
    seed: int,
    keys: tuple[str, ...],
    timer: LatencyTimer,
) -> list[list[Candidate]]:
    """The candidates of each layer, targets first, for all channels that its groups may keep.

    A layer of which no single group holds all outputs has no ghosts.
    """
    groups = dict(enumerate(of_groups, len(layers)))
    lists, statistics_of_all = [], compute_layer_statistics(program, list(targets), calibration, seed)
    for k, (target, statistics) in enumerate(zip(targets, statistics_of_all, strict=True)):
        of_outputs, in_counts = constraints.get((k, KEPT_OUT)), _kept_counts(groups, constraints.get((k, KEPT_IN)))
        if of_outputs is None or _is_of_all_outputs(of_outputs):
            alternatives = [] if of_outputs is None else groups[of_outputs.group]
            kept_out = [candidate.kept for candidate in alternatives if candidate.kept]
            lists.append(layer_candidates(program, target, statistics, keys, timer, kept_out, in_counts))
        else:
            out_counts = _kept_counts(groups, of_outputs)
            lists.append(dense_candidates(program, target.conv, keys, timer, out_counts, in_counts))
    for k, layer in enumerate(layers[len(targets) :], len(targets)):
        counts = [_kept_counts(groups, constraints.get((k, key))) for key in (KEPT_OUT, KEPT_IN)]
        lists.append(dense_candidates(program, layer, keys, timer, *counts))
    return lists


def _is_of_all_outputs(constraint: Constraint) -> TypeGuard[GroupConstraint]:
    return isinstance(constraint, GroupConstraint) and (constraint.per_channel, constraint.others) == (1, 0)


def _kept_counts(groups: Mapping[int, list[Candidate]], constraint: Constraint | None) -> list[int]:
    """The numbers of outputs or inputs that a layer may keep by a constraint; for a sum over groups some of them."""
    match constraint:
        case None:
            return []
        case GroupConstraint():
            sizes = [len(candidate.kept) for candidate in groups[constraint.group] if candidate.kept]
            return [constraint.others + constraint.per_channel * size for size in sizes]
        case SumConstraint(total=total, ranges=ranges):
            least = total - sum(part.per_channel * (part.size - 1) for part in ranges)
            return sorted({max(least, math.ceil(total * k / SUM_STEPS)) for k in range(1, SUM_STEPS)} - {total})
