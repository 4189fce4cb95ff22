"""The search space: the candidates of each targeted convolution and channel group, with their costs and losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ghostify import skip_reasons
from ghostify.errors import GhostifyError
from ghostify.fitting.assignment import GhostAssignment
from ghostify.fitting.sensitivity import PreparedCalibration, prepare_calibration
from ghostify.graph.program import Program
from ghostify.planning.planner import PlanTarget, Skip, may_prune, resolve_targets
from ghostify.planning.policy import Policy
from ghostify.pruning.pruning_groups import PruningGroup, Unprunable, find_pruning_groups
from ghostify.search.candidate_lists import KEPT_OUT, group_lists, layer_lists
from ghostify.search.candidates import Candidate
from ghostify.search.costs import COSTS
from ghostify.search.group_statistics import compute_group_statistics
from ghostify.search.measured_losses import MeasuredLosses
from ghostify.search.model_changes import ConvChange, ModelChange, change_of_group
from ghostify.search.simulation import Simulator
from ghostify.search.solver import Constraint, GroupConstraint, choose_candidates
from ghostify.timing.timer import LatencyTimer

MAX_REASONS = 5


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """The candidates of each targeted convolution, then of each linear layer that groups prune, then of each channel
    group; `totals` are the original's costs, and `original_costs` the part of them that each list of candidates
    replaces.

    `targets` holds every convolution: its target, or why it is skipped. By `constraints`, the outputs or inputs of a
    layer are as many as its groups keep. `notes` go to the plan. With calibration images, `measured` are the
    losses that simulations have measured so far.
    """

    program: Program
    targets: tuple[PlanTarget | Skip, ...]
    candidates: tuple[list[Candidate], ...]
    totals: Mapping[str, float]
    original_costs: tuple[tuple[float, ...], ...]
    timer: LatencyTimer
    groups: tuple[PruningGroup, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    notes: tuple[str, ...] = ()
    measured: MeasuredLosses | None = None

    @property
    def layers(self) -> list[PlanTarget]:
        """The convolutions with candidates, whose lists come first."""
        return [target for target in self.targets if isinstance(target, PlanTarget)]

    @property
    def first_group(self) -> int:
        """The number of the first group's list."""
        return len(self.candidates) - len(self.groups)

    def change_of(self, number: int, pick: int) -> ModelChange:
        """The simulated change of one candidate alone: of ghosts in pruned layers, that of the kept maps."""
        candidate, layers = self.candidates[number][pick], self.layers
        if number >= self.first_group:
            group = self.groups[number - self.first_group]
            return () if candidate.kept is None else change_of_group(self.program, group, candidate.kept)
        if candidate.layout is None:  # as that of every linear layer
            return ()
        name, kept_out = layers[number].conv.name, self._kept_out(number, candidate)
        return (ConvChange(name, None, candidate.layout, kept_out, candidate.assignment),)

    def assignments(self, picks: Sequence[int]) -> dict[str, GhostAssignment]:
        """The assignments of ghosts of the chosen candidates that have one, by convolution."""
        picked = {t.conv.name: c[k].assignment for t, c, k in zip(self.layers, self.candidates, picks, strict=False)}
        return {name: assignment for name, assignment in picked.items() if assignment is not None}

    def _kept_out(self, number: int, candidate: Candidate) -> tuple[int, ...] | None:
        """The kept outputs of a candidate of a convolution."""
        if candidate.kept_out_count is None:
            return None
        of_one_group = (c for c in self.constraints if isinstance(c, GroupConstraint))
        groups = [c.group for c in of_one_group if (c.conv, c.key) == (number, KEPT_OUT)]
        alternatives = (c.kept for group in groups for c in self.candidates[group] if c.kept is not None)
        return next(kept for kept in alternatives if len(kept) == candidate.kept_out_count)

    @property
    def fixed(self) -> list[float]:
        """The costs of everything that has no candidates."""
        searched = [sum(costs[k] for costs in self.original_costs) for k in range(len(self.totals))]
        return [total - part for total, part in zip(self.totals.values(), searched, strict=True)]

    @property
    def minimum_shares(self) -> dict[str, float]:
        """The minimum share of each cost, whatever the other costs."""
        minima = [self._minimum(k) for k in range(len(self.totals))]
        rows = zip(self.totals.items(), minima, self.fixed, strict=True)
        return {key: (minimum + fixed) / total for (key, total), minimum, fixed in rows}

    def _minimum(self, k: int) -> float:
        """The minimum sum of one cost over the candidates."""
        if not self.constraints:
            return sum(min(c.costs[k] for c in candidates) for candidates in self.candidates)
        priced = [[replace(c, loss=c.costs[k]) for c in candidates] for candidates in self.candidates]
        picks = choose_candidates(priced, [math.inf] * len(self.totals), self.constraints)
        assert picks is not None
        return sum(candidates[pick].loss for candidates, pick in zip(priced, picks, strict=True))


def build_search_space(
    program: Program,
    policy: Policy,
    keys: tuple[str, ...],
    calibration: Iterable[Any] | PreparedCalibration | None,
    seed: int,
    timer: LatencyTimer,
) -> SearchSpace:
    """The candidates of all targets, and of channel groups where rules allow pruning, with the costs named by `keys`.

    Raises `GhostifyError` where the program has no shapes, or pruning no calibration images.
    """
    prunes = any(rule.prune for rule in policy.rules)
    if program.macs is None:
        raise GhostifyError("budget: needs the model's shapes. Pass example_inputs.")
    for rule in policy.rules:
        if isinstance(rule.cheap, int) and rule.ratio is None:
            raise GhostifyError(
                f"cheap {rule.cheap}: does not work with a budget. Use auto, depthwise or pointwise, or give its rule "
                "a ratio."
            )
    if prunes and calibration is None:
        raise GhostifyError("prune: needs calibration images. Pass calibration (--calibration FOLDER).")
    decisions = resolve_targets(program, policy)
    targets = [t for t in decisions if isinstance(t, PlanTarget)]
    totals = {key: COSTS[key].of_program(program, timer) for key in keys}
    prepared = None if calibration is None else prepare_calibration(program, calibration, seed)
    groups, unprunable = _prunable_groups(program, policy, targets) if prunes else ([], [])
    group_statistics = [] if prepared is None else compute_group_statistics(program, groups, prepared, seed)
    members = {member.conv for statistics in group_statistics for member in statistics.group.members}
    layers = [*(target.conv for target in targets), *(layer for layer in program.linear_layers if layer in members)]
    of_groups, constraints = group_lists(program, layers, group_statistics, keys, timer)
    of_layers = layer_lists(program, targets, layers, of_groups, constraints, prepared, seed, keys, timer)
    pruned_groups = tuple(statistics.group for statistics in group_statistics)
    notes = (_why_unpruned(groups, unprunable),) if prunes and not group_statistics else ()
    original_costs = tuple(candidates[0].costs for candidates in (*of_layers, *of_groups))
    of_targets = map(_without_dense, targets, of_layers)
    lists = (*of_targets, *of_layers[len(targets) :], *of_groups)
    measured = None if prepared is None else MeasuredLosses(Simulator(program, prepared, seed))
    return SearchSpace(
        program=program,
        targets=tuple(decisions),
        candidates=lists,
        totals=totals,
        original_costs=original_costs,
        timer=timer,
        groups=pruned_groups,
        constraints=tuple(constraints.values()),
        notes=notes,
        measured=measured,
    )


def _without_dense(target: PlanTarget, candidates: list[Candidate]) -> list[Candidate]:
    """The candidates with ghosts where the rule has a ratio that leaves any, else all."""
    with_ghosts = [c for c in candidates if c.layout is not None]
    return with_ghosts if target.rule.ratio is not None and with_ghosts else candidates


def _prunable_groups(
    program: Program, policy: Policy, targets: Sequence[PlanTarget]
) -> tuple[list[PruningGroup], list[Unprunable]]:
    """Channel groups whose convolutions may all lose channels, and the other groups with their reasons."""
    names = {conv.name for conv in (*(target.conv for target in targets), *program.linear_layers)}
    ratios = {target.conv.name: target.rule.ratio for target in targets}
    groups, unprunable = list[PruningGroup](), list[Unprunable]()
    for group in find_pruning_groups(program):
        if isinstance(group, Unprunable):
            unprunable.append(group)
            continue
        fixed = [conv for conv in group.dense if conv.name not in names]
        fixed += [member.conv for member in group.members if not may_prune(program, policy, member.conv)]
        partial = [m.conv for m in group.members if m.prunes_outputs and m.conv.outputs != group.size]
        fixed += [conv for conv in partial if ratios.get(conv.name) is not None]
        if fixed:
            reason = skip_reasons.not_prunable(fixed[0].name)
            unprunable.append(Unprunable(group.members[0].conv.name, reason))
        else:
            groups.append(group)
    return groups, unprunable


def _why_unpruned(groups: Sequence[PruningGroup], unprunable: Sequence[Unprunable]) -> str:
    """Why no channel group is pruned, by the first groups."""
    unreached = [Unprunable(g.members[0].conv.name, skip_reasons.CONSUMERS_NOT_REACHED) for g in groups]
    reasons = [f"channels of {group.name}: {group.reason}" for group in (*unreached, *unprunable)]
    more = [f"and {len(reasons) - MAX_REASONS} more"] if len(reasons) > MAX_REASONS else []
    return "; ".join([skip_reasons.NO_GROUP_PRUNED, *reasons[:MAX_REASONS], *more])
