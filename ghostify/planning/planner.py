"""What will be done: every convolution exactly once, rewritten or skipped with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ghostify.errors import GhostifyError
from ghostify.graph.neighbours import GraphIndex, find_residual_operand, following_activation, following_norm
from ghostify.graph.program import Convolution, Program
from ghostify.modules.layout import (
    Depthwise,
    GhostForm,
    GhostLayout,
    form_of,
    intrinsic_count,
    may_read_activated,
    round_up_width,
)
from ghostify.planning import cost, skip_reasons
from ghostify.planning.policy import Policy, Rule
from ghostify.pruning.channel_groups import ChannelGroup, ChannelGroups, find_channel_groups
from ghostify.pruning.kept_channels import KeptChannels
from ghostify.pruning.permutation_target import find_permutation_target
from ghostify.pruning.pruning_groups import PruningGroup, conv_after_pruning, kept_by_conv


@dataclass(frozen=True)
class GhostRewrite:
    """A convolution that becomes a ghost module.

    Names of modules and nodes are those within the convolution's part. `norm` names the BatchNorm behind it whose
    statistics take up constant shifts; `residual_operand` the node that its output is added to; `activation` the node
    that activates its maps, where ghosts may read them so; `permutation_target` is the group of its channels where the
    others in it take up their order, None where a gather remains. With a `kept_channels`, `layout` is of the maps that
    it keeps. MACs are for one output position.
    """

    conv: Convolution
    layout: GhostLayout
    norm: str | None
    residual_operand: str | None
    activation: str | None
    permutation_target: ChannelGroup | None
    macs_before: int
    macs_after: int
    kept_channels: KeptChannels | None = None


@dataclass(frozen=True)
class PruneRewrite:
    """A convolution of a `PruningGroup` that keeps its form, not all its channels; `norm`, `residual_operand` and MACs
    as in `GhostRewrite`."""

    conv: Convolution
    kept_channels: KeptChannels
    norm: str | None
    residual_operand: str | None
    macs_before: int
    macs_after: int


@dataclass(frozen=True)
class Skip:
    """A convolution that stays as it is, and why."""

    conv: Convolution
    reason: str


@dataclass(frozen=True)
class PlanTarget:
    """A convolution that may be rewritten, and the rule that speaks of it."""

    conv: Convolution
    rule: Rule


@dataclass(frozen=True)
class Plan:
    """Every convolution of the program once, in order of first use. `macs_*` are whole-model totals where known.

    `notes` say what a rule allows and the plan could not do.
    """

    entries: tuple[GhostRewrite | PruneRewrite | Skip, ...]
    macs_before: int | None = None
    macs_after: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def rewrites(self) -> tuple[GhostRewrite, ...]:
        return tuple(e for e in self.entries if isinstance(e, GhostRewrite))

    @property
    def pruned(self) -> dict[str, KeptChannels]:
        """What is left of the convolutions that lose maps, by name."""
        return {e.conv.name: e.kept_channels for e in self.changes if e.kept_channels is not None}

    @property
    def changes(self) -> tuple[GhostRewrite | PruneRewrite, ...]:
        return tuple(e for e in self.entries if not isinstance(e, Skip))

    @property
    def skips(self) -> tuple[Skip, ...]:
        return tuple(e for e in self.entries if isinstance(e, Skip))


def plan(program: Program, policy: Policy | None = None) -> Plan:
    """Decide for every convolution of `program` what becomes of it under `policy` (default: all dense ones at ratio 2).

    Raises `GhostifyError` for a pattern that matches no convolution.
    """
    return build_plan(program, [_with_ratio(t) for t in resolve_targets(program, policy or Policy())])


def resolve_targets(program: Program, policy: Policy) -> list[PlanTarget | Skip]:
    """For every convolution the rule that may rewrite it, or why none may."""
    _check_patterns_match(program, policy)
    return [_target(program, policy, conv, i == 0) for i, conv in enumerate(program.convolutions)]


def build_plan(
    program: Program,
    decided: Iterable[tuple[PlanTarget, GhostLayout] | Skip],
    kept: Mapping[PruningGroup, tuple[int, ...]] | None = None,
) -> Plan:
    """The plan that gives each target its layout, and each group the channels that it keeps; what saves nothing is
    skipped."""
    subgraphs = {
        path: _Subgraph(GraphIndex(part), find_channel_groups(part)) for path, part in program.subgraphs.items()
    }
    narrowed = kept_by_conv(program, kept or {})
    entries = [_entry(subgraphs, one, narrowed) for one in decided]
    saved = [_saved(e) for e in entries if not isinstance(e, Skip)]
    total = program.macs
    after = None if total is None or None in saved else total - sum(s for s in saved if s is not None)
    return Plan(tuple(entries), total, after)


def may_prune(program: Program, policy: Policy, conv: Convolution) -> bool:
    """Whether the rule that speaks of a convolution lets maps be left out."""
    rule = _rule(program, policy, conv)
    return isinstance(rule, Rule) and rule.prune


def make_layout(outputs: int, intrinsic: int, cheap: str | int, dw_size: int) -> GhostLayout:
    """The layout of `intrinsic` of `outputs` maps with ghosts of the form that a rule calls `cheap`."""
    form: GhostForm
    match cheap:
        case "depthwise":
            form = Depthwise(dw_size)
        case "pointwise":
            form = form_of(intrinsic, intrinsic, 1)
        case int():
            form = form_of(intrinsic, round_up_width(outputs, intrinsic, min(cheap, intrinsic)), dw_size)
        case _:
            raise GhostifyError(f"cheap {cheap!r}: is not one form of ghost. Use 'depthwise', 'pointwise' or a width.")
    return GhostLayout(outputs, intrinsic, form)


def _rule(program: Program, policy: Policy, conv: Convolution) -> Rule | Skip:
    """The first rule that targets a convolution, or why none changes it."""
    if conv.unsupported_reason:
        return Skip(conv, conv.unsupported_reason)
    module = program.conv(conv.name)
    rule = next((r for r in policy.rules if r.matches(conv.name, module, conv.conv_class)), None)
    if rule is None:
        return Skip(conv, skip_reasons.NOT_TARGETED)
    return Skip(conv, skip_reasons.IGNORED) if rule.ignores(conv.name, module, conv.conv_class) else rule


def _target(program: Program, policy: Policy, conv: Convolution, first: bool) -> PlanTarget | Skip:
    rule = _rule(program, policy, conv)
    if isinstance(rule, Skip):
        return rule
    if first and policy.keep_first:
        return Skip(conv, skip_reasons.FIRST_CONV)
    if conv.groups > 1:
        is_depthwise = conv.groups == conv.inputs
        return Skip(conv, skip_reasons.DEPTHWISE if is_depthwise else skip_reasons.grouped(conv.groups))
    return PlanTarget(conv, rule)


def _with_ratio(target: PlanTarget | Skip) -> tuple[PlanTarget, GhostLayout] | Skip:
    if isinstance(target, Skip):
        return target
    conv, rule = target.conv, target.rule
    if rule.cheap == "auto":
        raise GhostifyError("cheap 'auto' chooses by a budget: pass budget={'macs': 0.5}, or name the form")
    if rule.prune:
        raise GhostifyError("narrow leaves out maps by a budget: pass budget={'macs': 0.5}")
    intrinsic = intrinsic_count(conv.outputs, rule.ratio)
    if rule.ratio == 1:
        return Skip(conv, skip_reasons.RATIO_ONE)
    if not 1 <= intrinsic < conv.outputs:
        return Skip(conv, skip_reasons.no_ghost_maps(rule.ratio, conv.outputs))
    return target, make_layout(conv.outputs, intrinsic, rule.cheap, rule.dw_size)


@dataclass(frozen=True)
class _Subgraph:
    """What planning reads of a part's graph."""

    wiring: GraphIndex
    groups: ChannelGroups


def _rewrite(
    subgraph: _Subgraph, target: PlanTarget, layout: GhostLayout, kept_channels: KeptChannels | None
) -> GhostRewrite | Skip:
    conv = target.conv
    left = conv if kept_channels is None else conv_after_pruning(conv, kept_channels)
    dense, after = cost.conv_macs(left), cost.ghost_macs(left, layout)
    if after >= dense:
        return Skip(conv, skip_reasons.no_macs_saved(dense, after))
    nodes, wiring = [call.node for call in conv.calls], subgraph.wiring
    norm = following_norm(wiring, nodes)
    residual_operand = find_residual_operand(wiring, nodes, norm)
    activation = (
        following_activation(wiring, nodes, norm) if target.rule.activated and may_read_activated(layout.form) else None
    )
    before, permutation_target = cost.conv_macs(conv), find_permutation_target(wiring.module, subgraph.groups, nodes)
    return GhostRewrite(
        conv, layout, norm, residual_operand, activation, permutation_target, before, after, kept_channels
    )


def _entry(
    subgraphs: Mapping[str, _Subgraph],
    decided: tuple[PlanTarget, GhostLayout] | Skip,
    narrowed: Mapping[str, KeptChannels],
) -> GhostRewrite | PruneRewrite | Skip:
    conv = decided.conv if isinstance(decided, Skip) else decided[0].conv
    own, kept_channels = subgraphs[conv.subgraph_path], narrowed.get(conv.name)
    entry = decided if isinstance(decided, Skip) else _rewrite(own, *decided, kept_channels)
    return (
        entry if kept_channels is None or isinstance(entry, GhostRewrite) else _prune(own.wiring, conv, kept_channels)
    )


def _prune(wiring: GraphIndex, conv: Convolution, kept_channels: KeptChannels) -> PruneRewrite:
    nodes = [conv.calls[0].node]
    norm = following_norm(wiring, nodes)
    before, after = cost.conv_macs(conv), cost.conv_macs(conv_after_pruning(conv, kept_channels))
    return PruneRewrite(conv, kept_channels, norm, find_residual_operand(wiring, nodes, norm), before, after)


def _saved(entry: GhostRewrite | PruneRewrite) -> int | None:
    places = cost.total_positions(entry.conv.calls)
    return None if places is None else places * (entry.macs_before - entry.macs_after)


def _check_patterns_match(program: Program, policy: Policy) -> None:
    convs = [(c, program.conv(c.name)) for c in program.convolutions if not c.unsupported_reason]
    for rule in policy.rules:
        for key in ("targets", "ignore"):
            for pattern in getattr(rule, key):
                single = Rule(targets=(pattern,))
                if pattern == "*" or any(single.matches(c.name, m, c.conv_class) for c, m in convs):
                    continue
                if isinstance(pattern, str) and any(pattern == c.name for c in program.convolutions):
                    continue
                names = ", ".join(c.name for c, _ in convs[:3]) or "none"
                raise GhostifyError(
                    f"{key} {pattern!r} matches no convolution of {type(program.module).__name__}: "
                    f"its {len(convs)} convolutions are {names}, ... (ghostify plan lists them)"
                )
