"""What may become of each convolution, and of each link: layouts and maps with their costs, and the error they add."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import torch
from torch import Tensor
from typing_extensions import assert_never

from ghostify.errors import GhostifyError
from ghostify.fitting.assignment import GhostAssignment, assign_ghosts
from ghostify.fitting.linear_solvers import cholesky_root
from ghostify.graph.neighbours import following_norm_of
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
from ghostify.planning.planner import PlanTarget
from ghostify.planning.policy import Rule
from ghostify.pruning.pruning_groups import GroupMember, PruningGroup, pruned_conv
from ghostify.search.group_statistics import GroupStatistics
from ghostify.search.halves import mean_across_halves
from ghostify.search.layer_statistics import LayerStatistics
from ghostify.timing.latency import Counts, layer_latency, pruned_latency
from ghostify.timing.timer import LatencyTimer

RATIOS = (1.25, 1.5, 2, 2.5, 3, 4, 6, 8)
STEPS, COARSE, PRUNE_STEPS = 32, 16, 12
SIMD_LANES = 16
MAX_LATENCY_RATIO = 0.97


@dataclass(frozen=True)
class Candidate:
    """One way to treat a convolution, or a link, its costs, and the output error it would add.

    Of a convolution: its layout (None: dense), and how many maps it `kept_out_count` and `kept_in_count` where links
    leave some out. Of a link: the maps kept (None: all), and costs beyond those of its convolutions that have
    candidates of their own.
    """

    layout: GhostLayout | None
    costs: tuple[float, ...]
    loss: float
    kept_out_count: int | None = None
    kept_in_count: int | None = None
    kept: tuple[int, ...] | None = None


def layer_candidates(
    program: Program,
    target: PlanTarget,
    profile: LayerStatistics,
    keys: tuple[str, ...],
    clock: LatencyTimer,
    makes: Sequence[tuple[int, ...]] = (),
    reads: Sequence[int] = (),
) -> list[Candidate]:
    """As it is, first, and every layout of the rule's form that saves multiply-accumulates and is worth its cost; the
    same for each choice of fewer maps that it `kept_out_count` and number of those that it `kept_in_count`.

    Where time counts, fewer maps and ghosts do not meet in one layer; making fewer and reading fewer do, and each saves
    its share of the other's time.
    """
    timed, size = "latency" in keys, target.rule.dw_size
    if timed and (makes or reads):
        found = _non_dominated(program, target, _LossEstimator(profile, size), keys, clock)
        return [*found, *_dense_with_fewer(program, target.conv, found[0], keys, clock, makes, reads)]
    return [
        candidate
        for kept in (None, *makes)
        for losses in [_LossEstimator(profile if kept is None else profile.restrict_to(kept), size)]
        for count in (None, *reads)
        for candidate in _non_dominated(program, target, losses, keys, clock, kept, count)
    ]


def group_candidates(
    program: Program,
    thinning: GroupStatistics,
    others: Sequence[GroupMember],
    keys: tuple[str, ...],
    clock: LatencyTimer,
) -> list[Candidate]:
    """As it is, first, and fewer and fewer maps of a link; where they are to be timed, those that become faster.

    `others` are the members that have no candidates of their own.
    """
    group = thinning.group
    counts = {max(1, round(group.size * k / PRUNE_STEPS)) for k in range(1, PRUNE_STEPS)}
    if "latency" in keys:
        counts = {max(SIMD_LANES, SIMD_LANES * round(count / SIMD_LANES)) for count in counts}
    ways = [thinning.kept(count) for count in sorted(counts) if count < group.size]
    if "latency" in keys:
        whole, *fewer = _with_fewer(program, group.members, ways, "latency", clock)
        ways = [kept for kept, own in zip(ways, fewer, strict=True) if own < MAX_LATENCY_RATIO * whole]
    spent = {key: _with_fewer(program, others, ways, key, clock) for key in keys}
    if "params" in keys:
        norms = _parameters_per_channel(program, group)
        sizes = [group.size, *map(len, ways)]
        spent["params"] = [own + norms * size for own, size in zip(spent["params"], sizes, strict=True)]
    costs = [tuple(spent[key][k] - spent[key][0] for key in keys) for k in range(len(ways) + 1)]
    losses = [thinning.loss(len(kept)) for kept in ways]
    both = zip([None, *ways], costs, [0.0, *losses], strict=True)
    return [Candidate(None, own, loss, kept=kept) for kept, own, loss in both]


def _non_dominated(
    program: Program,
    target: PlanTarget,
    losses: _LossEstimator,
    keys: tuple[str, ...],
    clock: LatencyTimer,
    kept: tuple[int, ...] | None = None,
    reads: int | None = None,
) -> list[Candidate]:
    """The dense form, first, and the layouts of what is left that nothing beats.

    What a layout costs is known before the error that it would add, which takes long to find for many maps: whatever
    is beaten at the least error that it could have is not looked at.
    """
    timed, makes = "latency" in keys, None if kept is None else len(kept)
    conv = pruned_conv(target.conv, makes, reads)
    layouts = [
        o
        for o in _layouts(target.rule, conv, losses.profile, STEPS if conv == target.conv else COARSE, timed)
        if cost.ghost_macs(conv, o) < cost.conv_macs(conv)
    ]
    spending = [_spent(program, conv, [None, *layouts], key, clock) for key in keys]
    if "params" in keys and target.rule.activated:
        copied = _copied(program, target.conv)  # by ghosts that read activated maps
        read = [copied * o.intrinsic if o and may_read_activated(o.form) else 0 for o in (None, *layouts)]
        own = zip(spending[keys.index("params")], read, strict=True)
        spending[keys.index("params")] = [c + more for c, more in own]
    whole, *costs = zip(*spending, strict=True)
    found = [Candidate(None, whole, 0.0, makes, reads)]
    for layout, spent in zip(layouts, costs, strict=True):
        if timed and spent[keys.index("latency")] >= MAX_LATENCY_RATIO * whole[keys.index("latency")]:
            continue
        hoped = Candidate(layout, spent, losses.least(layout))
        if not any(_dominates(other, hoped) for other in found):
            found.append(Candidate(layout, spent, losses.of(layout), makes, reads))
    return [found[0], *(c for c in found[1:] if not any(_dominates(other, c) for other in found))]


def _dense_with_fewer(
    program: Program,
    conv: Convolution,
    whole: Candidate,
    keys: tuple[str, ...],
    clock: LatencyTimer,
    makes: Sequence[tuple[int, ...]],
    reads: Sequence[int],
) -> Iterator[Candidate]:
    """The dense form with fewer maps, timed: where it makes fewer and reads fewer, each saves its share of the other's
    time."""
    outputs, inputs = [None, *map(len, makes)], [None, *reads]
    ways: list[Counts] = [*((count, None) for count in outputs), *((None, count) for count in reads)]
    taken = dict(zip(ways, pruned_latency(program.conv(conv.name), conv, ways[1:], clock), strict=True))
    for way in list(product(outputs, inputs))[1:]:
        left, share = pruned_conv(conv, *way), taken[way[0], None] * taken[None, way[1]] / taken[None, None] ** 2
        both = zip(keys, whole.costs, strict=True)
        costs = (spent * share if key == "latency" else _counted(left, None, key) for key, spent in both)
        yield Candidate(None, tuple(costs), 0.0, *way)


def _spent(
    program: Program, conv: Convolution, layouts: list[GhostLayout | None], key: str, clock: LatencyTimer
) -> list[float]:
    """What each layout of a layer costs."""
    if key == "latency":
        return layer_latency(program.conv(conv.name), conv, layouts, clock)
    return [_counted(conv, own, key) for own in layouts]


def _counted(conv: Convolution, layout: GhostLayout | None, key: str) -> float:
    """Multiply-accumulates or parameters; each weight is used once a position."""
    weights = cost.conv_macs(conv) if layout is None else cost.ghost_macs(conv, layout)
    return float(
        weights * (cost.total_positions(conv.calls) or 0) if key == "macs" else weights + conv.outputs * conv.bias
    )


def _with_fewer(
    program: Program, members: Sequence[GroupMember], ways: Sequence[tuple[int, ...]], key: str, clock: LatencyTimer
) -> list[float]:
    """What members of a link cost together as they are, first, and with fewer maps in each of `ways`."""
    total = [0.0] * (len(ways) + 1)
    for member in members:
        counts = [
            (len(kept) if member.prunes_outputs else None, len(kept) if member.prunes_inputs else None) for kept in ways
        ]
        if key == "latency":
            conv = program.conv(member.conv.name)
            own = pruned_latency(conv, member.conv, counts, clock)
        else:
            forms = [member.conv, *(pruned_conv(member.conv, *count) for count in counts)]
            own = [_counted(form, None, key) for form in forms]
        total = [spent + more for spent, more in zip(total, own, strict=True)]
    return total


def _copied(program: Program, conv: Convolution) -> int:
    """Parameters a map of the norm behind a convolution."""
    norm = following_norm_of(program, conv)
    return 0 if norm is None else _per_map(program, conv, norm)


def _parameters_per_channel(program: Program, group: PruningGroup) -> int:
    """Parameters that norms and activations have for a channel of a group."""
    own = dict(program.subgraphs[group.subgraph_path].named_parameters())
    return sum(member.path in own for member in group.channels.parameters)


def _per_map(program: Program, conv: Convolution, norm: str) -> int:
    """Parameters a map of a norm in a convolution's part."""
    return cost.count_parameters(program.subgraphs[conv.subgraph_path].get_submodule(norm)) // conv.outputs


def _dominates(a: Candidate, b: Candidate) -> bool:
    better = a.loss <= b.loss and all(x <= y for x, y in zip(a.costs, b.costs, strict=True))
    return better and (a.loss, a.costs) != (b.loss, b.costs)


def _layouts(rule: Rule, conv: Convolution, profile: LayerStatistics, steps: int, timed: bool) -> Iterator[GhostLayout]:
    """Pointwise ones in so many steps, then depthwise ones; where they are timed, fewer, that fill vector registers."""
    n = conv.outputs
    if Pointwise in rule.forms:
        sizes = {max(1, round(n * k / steps)) for k in range(1, steps)}
        if timed:
            sizes = {max(SIMD_LANES, SIMD_LANES * round(m / SIMD_LANES)) for m in sizes}
        yield from (GhostLayout(n, m, form_of(m, m, 1)) for m in sorted(sizes) if m < n)
    if Depthwise in rule.forms and profile.maps is not None:
        for m in sorted({intrinsic_count(n, ratio) for ratio in RATIOS} - {n}):
            yield GhostLayout(n, m, Depthwise(rule.dw_size))


class _LossEstimator:
    """The error of the model's outputs that layouts of one convolution would add; pairs of maps are known for kernels
    of `dw_size`."""

    def __init__(self, profile: LayerStatistics, dw_size: int) -> None:
        self.profile, self.dw_size = profile, dw_size
        self._known: dict[GhostLayout, float] = {}

    def of(self, layout: GhostLayout) -> float:
        """That of the best directions for pointwise ghosts, of the chosen pairs for depthwise ones; for grouped ones a
        bound, see `_within_groups`. Raises `GhostifyError` where nothing is known of their kernels."""
        if layout not in self._known:
            self._known[layout] = self._found(layout)
        return self._known[layout]

    def _found(self, layout: GhostLayout) -> float:
        match layout.form:
            case Pointwise():
                return float(self._truncation_losses[layout.ghosts])
            case Depthwise(d):
                if layout.is_low_rank and not self._knows_pairs(d):
                    return float(self._truncation_losses[layout.ghosts])
                pairs = self._pairs(d)
                return assign_ghosts(pairs, layout).total(pairs)
            case Grouped(_, d):
                return self._within_groups(assign_ghosts(self._pairs(d), layout), d)
            case _:
                assert_never(layout.form)

    def least(self, layout: GhostLayout) -> float:
        """No more than that, and sooner known for depthwise ghosts: as if every ghost could choose its map, and the
        ghosts were those who lose least so."""
        match layout.form:
            case Depthwise(d) if self._knows_pairs(d):
                return float(self._cheapest[: layout.ghosts].sum())
            case Depthwise() | Grouped() | Pointwise():
                return self.of(layout)
            case _:
                assert_never(layout.form)

    def _within_groups(self, groups: GhostAssignment, kernel_size: int) -> float:
        """The error of the best directions within each group, as if kernels had one pixel; groups add up.

        A larger kernel has that pixel at its centre, so each of its ghosts errs no more: an upper bound for the fit
        where channels count apart (a diagonal metric), and what the fit reaches where kernels have one pixel. Larger
        kernels are fitted ghost by ghost, so channels count apart for them here; where the metric is far from
        diagonal, the fit, which chooses directions by all of it, can still err more.
        """
        profile, width = self.profile, groups.intrinsic.shape[1]
        if kernel_size > 1:
            profile = replace(profile, metric=torch.diag(profile.metric.diagonal()))
        return sum(float(_truncation_losses(profile.among(own))[len(own) - width]) for own in groups.members())

    def _knows_pairs(self, kernel_size: int) -> bool:
        return kernel_size == self.dw_size and self.profile.maps is not None

    def _pairs(self, kernel_size: int) -> Tensor:
        if not self._knows_pairs(kernel_size):
            raise GhostifyError(f"kernel size {kernel_size}: pairs of maps are not known for it. Profile them first.")
        return self._measured_pairs

    @cached_property
    def _truncation_losses(self) -> Tensor:
        return _truncation_losses(self.profile)

    @cached_property
    def _measured_pairs(self) -> Tensor:
        assert self.profile.maps is not None
        return self.profile.maps.pair_errors(self.profile.metric.diagonal())

    @cached_property
    def _cheapest(self) -> Tensor:
        others = self._measured_pairs.clone().fill_diagonal_(float("inf"))
        return others.amin(0).sort().values


def _truncation_losses(profile: LayerStatistics) -> Tensor:
    """Weighted error of the best n - k directions for the outputs, for k = 0 ... n left out: the sum of the k smallest
    eigenvalues. Directions of one half of the images are judged on the other: few images look simpler than they are."""
    root = cholesky_root(profile.metric)

    def errors(fitted: Tensor, tested: Tensor) -> Tensor:
        vectors = torch.linalg.eigh(fitted).eigenvectors
        return ((vectors.T @ tested) * vectors.T).sum(1).clamp_min(0)

    lost = mean_across_halves([root.T @ c @ root for c in profile.covariances], errors)
    return torch.cat((torch.zeros(1, dtype=lost.dtype), lost.cumsum(0)))
