"""The candidates of each convolution and channel group: layouts and kept channels, their costs and predicted error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from typing_extensions import assert_never

from ghostify.fitting.assignment import GhostAssignment
from ghostify.graph.program import Convolution, Program
from ghostify.modules.layout import (
    Depthwise,
    GhostLayout,
    Grouped,
    Pointwise,
    form_of,
    intrinsic_count,
    may_read_activated,
)
from ghostify.planning import cost
from ghostify.planning.planner import PlanTarget, layouts_of_ratio
from ghostify.planning.policy import Rule
from ghostify.pruning.pruning_groups import GroupMember, pruned_conv
from ghostify.search.costs import COSTS, Cost
from ghostify.search.group_statistics import GroupStatistics
from ghostify.search.layer_statistics import LayerStatistics
from ghostify.search.loss_estimator import LossEstimator
from ghostify.timing.latency import Counts
from ghostify.timing.timer import LatencyTimer

RATIOS = (1.25, 1.5, 2, 2.5, 3, 4, 6, 8)
STEPS, COARSE_STEPS, PRUNE_STEPS = 32, 16, 12
SIMD_LANES = 16
MAX_MEASURED_RATIO = 0.97


@dataclass(frozen=True)
class Candidate:
    """One alternative for a convolution or a channel group, its costs, and the output error that it adds as predicted.

    For a convolution: its layout (None: dense) with the assignment of ghosts where it has one, and its numbers of
    outputs and inputs where channel groups prune them.
    For a group: the kept channels (None: all), and the costs beyond those of convolutions with candidates of their own.
    """

    layout: GhostLayout | None
    costs: tuple[float, ...]
    loss: float
    kept_out_count: int | None = None
    kept_in_count: int | None = None
    kept: tuple[int, ...] | None = None
    assignment: GhostAssignment | None = field(default=None, compare=False, repr=False)


def layer_candidates(
    program: Program,
    target: PlanTarget,
    statistics: LayerStatistics,
    keys: tuple[str, ...],
    timer: LatencyTimer,
    kept_out: Sequence[tuple[int, ...]] = (),
    kept_in_counts: Sequence[int] = (),
) -> list[Candidate]:
    """The dense convolution, first, and all layouts of the rule's forms that save MACs and are not dominated; where the
    rule has a ratio, those of that ratio.

    The same for each set of outputs `kept_out` and each number of inputs that channel groups may keep. Under a measured
    cost, no layer combines pruning and ghosts; pruned outputs and pruned inputs are combined.
    """
    costs, size = [COSTS[key] for key in keys], target.rule.dw_size
    if _has_measured(costs) and (kept_out or kept_in_counts):
        unpruned = _non_dominated(program, target, LossEstimator(statistics, size), costs, timer)
        out_counts = [len(channels) for channels in kept_out]
        pruned = _dense_pruned(program, target.conv, unpruned[0], costs, timer, out_counts, kept_in_counts)
        return [*unpruned, *pruned]
    return [
        candidate
        for channels in (None, *kept_out)
        for losses in [LossEstimator(statistics if channels is None else statistics.restrict_to(channels), size)]
        for count in (None, *kept_in_counts)
        for candidate in _non_dominated(program, target, losses, costs, timer, channels, count)
    ]


def dense_candidates(
    program: Program,
    conv: Convolution,
    keys: tuple[str, ...],
    timer: LatencyTimer,
    out_counts: Sequence[int] = (),
    in_counts: Sequence[int] = (),
) -> list[Candidate]:
    """A convolution or linear layer as it is, first, and with each other pair of numbers of outputs and inputs."""
    costs = [COSTS[key] for key in keys]
    unpruned = Candidate(None, tuple(c.of_layouts(program, conv, [None], timer)[0] for c in costs), 0.0)
    return [unpruned, *_dense_pruned(program, conv, unpruned, costs, timer, out_counts, in_counts)]


def group_candidates(
    program: Program,
    statistics: GroupStatistics,
    fixed_members: Sequence[GroupMember],
    keys: tuple[str, ...],
    timer: LatencyTimer,
) -> list[Candidate]:
    """All channels of a group, first, then fewer; under a measured cost those numbers that make the group cheaper.

    `fixed_members` are the members that have no candidates of their own.
    """
    costs, group = [COSTS[key] for key in keys], statistics.group
    counts = {max(1, round(group.size * k / PRUNE_STEPS)) for k in range(1, PRUNE_STEPS)}
    if _has_measured(costs):
        counts = _fill_registers(counts)
    alternatives = [statistics.kept(count) for count in sorted(counts) if count < group.size]
    for measured in (c for c in costs if c.is_measured):
        unpruned, *pruned = _members_cost(program, group.members, group.size, alternatives, measured, timer)
        alternatives = [
            kept
            for kept, member_cost in zip(alternatives, pruned, strict=True)
            if member_cost < MAX_MEASURED_RATIO * unpruned
        ]
    sizes = [group.size, *map(len, alternatives)]
    totals = []
    for one_cost in costs:
        per_channel = one_cost.per_channel(program, group)
        of_members = _members_cost(program, fixed_members, group.size, alternatives, one_cost, timer)
        totals.append([total + per_channel * size for total, size in zip(of_members, sizes, strict=True)])
    relative = [tuple(total[k] - total[0] for total in totals) for k in range(len(sizes))]
    losses = [0.0, *(statistics.loss(len(kept)) for kept in alternatives)]
    rows = zip([None, *alternatives], relative, losses, strict=True)
    return [Candidate(None, added, loss, kept=kept) for kept, added, loss in rows]


def _has_measured(costs: Sequence[Cost]) -> bool:
    return any(c.is_measured for c in costs)


def _fill_registers(counts: set[int]) -> set[int]:
    """The nearest numbers of channels that fill vector registers."""
    return {max(SIMD_LANES, SIMD_LANES * round(count / SIMD_LANES)) for count in counts}


def _non_dominated(
    program: Program,
    target: PlanTarget,
    losses: LossEstimator,
    costs: Sequence[Cost],
    timer: LatencyTimer,
    kept_out: tuple[int, ...] | None = None,
    kept_in_count: int | None = None,
) -> list[Candidate]:
    """The dense convolution, first, and the non-dominated layouts of the pruned convolution.

    Costs are known before the predicted error, which takes long for many maps: layouts that are dominated even at a
    lower bound of their error are left out without it.
    """
    kept_out_count = None if kept_out is None else len(kept_out)
    conv = pruned_conv(target.conv, kept_out_count, kept_in_count)
    steps = STEPS if conv == target.conv else COARSE_STEPS
    layouts = [
        layout
        for layout in _layouts(target.rule, conv, losses.statistics, steps, _has_measured(costs))
        if cost.ghost_macs(conv, layout) < cost.conv_macs(conv)
    ]
    dense, *rewritten = zip(*(_layout_costs(program, target, conv, layouts, c, timer) for c in costs), strict=True)
    candidates = [Candidate(None, dense, 0.0, kept_out_count, kept_in_count)]
    if target.rule.ratio is not None:
        rows_of_ratio = zip(layouts, rewritten, strict=True)
        return candidates + [
            _ghost_candidate(layout, layout_costs, losses, kept_out_count, kept_in_count)
            for layout, layout_costs in rows_of_ratio
        ]
    for layout, layout_costs in zip(layouts, rewritten, strict=True):
        rows = zip(costs, layout_costs, dense, strict=True)
        if any(c.is_measured and after >= MAX_MEASURED_RATIO * before for c, after, before in rows):
            continue
        bound = Candidate(layout, layout_costs, losses.lower_bound(layout))
        if not any(_dominates(other, bound) for other in candidates):
            candidates.append(_ghost_candidate(layout, layout_costs, losses, kept_out_count, kept_in_count))
    ghosts = [c for c in candidates[1:] if not any(_dominates(other, c) for other in candidates)]
    return lower_hull([candidates[0], *ghosts]) if len(costs) == 1 else [candidates[0], *ghosts]


def lower_hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates of one cost that lose less than every mixture of two others: the first, which costs the most and
    loses nothing, and others in their order (lower convex hull, Andrew 1979)."""
    hull = [candidates[0]]
    for candidate in sorted(candidates[1:], key=lambda c: (-c.costs[0], c.loss)):
        while len(hull) > 1 and not _is_below(hull[-2], hull[-1], candidate):
            hull.pop()
        hull.append(candidate)
    return [c for c in candidates if any(c is kept for kept in hull)]


def _is_below(before: Candidate, between: Candidate, after: Candidate) -> bool:
    """Whether a candidate loses less than the mixture of its neighbours that costs the same."""
    saved, saved_in_all = before.costs[0] - between.costs[0], before.costs[0] - after.costs[0]
    return (between.loss - before.loss) * saved_in_all < (after.loss - before.loss) * saved


def _ghost_candidate(
    layout: GhostLayout,
    costs: tuple[float, ...],
    losses: LossEstimator,
    kept_out_count: int | None,
    kept_in_count: int | None,
) -> Candidate:
    assignment = None if isinstance(layout.form, Pointwise) else losses.assignment(layout)
    return Candidate(layout, costs, losses.of(layout), kept_out_count, kept_in_count, assignment=assignment)


def _layout_costs(
    program: Program,
    target: PlanTarget,
    conv: Convolution,
    layouts: Sequence[GhostLayout],
    one_cost: Cost,
    timer: LatencyTimer,
) -> list[float]:
    """One cost of a convolution, dense first, then in each layout; with the norm's copy where ghosts read activated."""
    convs = one_cost.of_layouts(program, conv, [None, *layouts], timer)
    if not target.rule.activated:
        return convs
    per_map = one_cost.per_copied_map(program, target.conv)
    copied_maps = [0, *(layout.intrinsic if may_read_activated(layout.form) else 0 for layout in layouts)]
    return [conv_cost + per_map * count for conv_cost, count in zip(convs, copied_maps, strict=True)]


def _dense_pruned(
    program: Program,
    conv: Convolution,
    unpruned: Candidate,
    costs: Sequence[Cost],
    timer: LatencyTimer,
    out_counts: Sequence[int],
    in_counts: Sequence[int],
) -> Iterator[Candidate]:
    """The dense convolution for every other pair of numbers of outputs and inputs."""
    outputs, inputs = [None, *out_counts], [None, *in_counts]
    grids = [
        one_cost.of_pruned_grid(program, conv, before, outputs, inputs, timer)
        for one_cost, before in zip(costs, unpruned.costs, strict=True)
    ]
    for counts, pair_costs in zip(list(product(outputs, inputs))[1:], zip(*grids, strict=True), strict=True):
        yield Candidate(None, pair_costs, 0.0, *counts)


def _members_cost(
    program: Program,
    members: Sequence[GroupMember],
    size: int,
    alternatives: Sequence[tuple[int, ...]],
    one_cost: Cost,
    timer: LatencyTimer,
) -> list[float]:
    """The sum of one cost over members of a group of that size: unpruned, first, then for each alternative of kept
    channels."""
    total = [0.0] * (len(alternatives) + 1)
    for member in members:
        counts: list[Counts] = [member.kept_counts(size - len(kept)) for kept in alternatives]
        member_costs = one_cost.of_pruned(program, member.conv, counts, timer)
        total = [total_cost + more for total_cost, more in zip(total, member_costs, strict=True)]
    return total


def _dominates(a: Candidate, b: Candidate) -> bool:
    better = a.loss <= b.loss and all(x <= y for x, y in zip(a.costs, b.costs, strict=True))
    return better and (a.loss, a.costs) != (b.loss, b.costs)


def _layouts(
    rule: Rule, conv: Convolution, statistics: LayerStatistics, steps: int, measured: bool
) -> Iterator[GhostLayout]:
    """The layouts of the rule's forms, those of one form after the other; where the rule has a ratio, of that ratio."""
    if rule.ratio is not None:
        for layout in layouts_of_ratio(rule, conv.outputs):
            if statistics.maps is not None or isinstance(layout.form, Pointwise):
                yield layout
        return
    for form in rule.forms:
        if form is Pointwise:
            yield from _pointwise_layouts(conv.outputs, steps, measured)
        elif form is Depthwise:
            if statistics.maps is not None:
                yield from _depthwise_layouts(conv.outputs, rule.dw_size)
        elif form is not Grouped:  # a budget plans no groups: their width is the rule's
            assert_never(form)


def _pointwise_layouts(outputs: int, steps: int, measured: bool) -> Iterator[GhostLayout]:
    """Pointwise layouts in so many steps; under a measured cost those that fill registers."""
    sizes = {max(1, round(outputs * k / steps)) for k in range(1, steps)}
    if measured:
        sizes = _fill_registers(sizes)
    for intrinsic in sorted(sizes):
        if intrinsic < outputs:
            yield GhostLayout(outputs, intrinsic, form_of(intrinsic, intrinsic, 1))


def _depthwise_layouts(outputs: int, dw_size: int) -> Iterator[GhostLayout]:
    """Depthwise layouts in the ratios of `RATIOS`."""
    for intrinsic in sorted({intrinsic_count(outputs, ratio) for ratio in RATIOS} - {outputs}):
        yield GhostLayout(outputs, intrinsic, Depthwise(dw_size))
