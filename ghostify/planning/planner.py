"""The plan: every convolution exactly once, rewritten, pruned or skipped with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ghostify import skip_reasons
from ghostify.arguments import instance_of, optional, public
from ghostify.errors import GhostifyError
from ghostify.evaluation.output_comparison import OutputComparison
from ghostify.graph.neighbours import GraphIndex, find_residual_operand, following_activation, following_norm
from ghostify.graph.program import Convolution, Program, a_program
from ghostify.modules.layout import NAMED_FORMS, GhostLayout, intrinsic_count, make_layout, may_read_activated
from ghostify.planning import cost
from ghostify.planning.policy import Policy, Rule, as_policy
from ghostify.pruning.channel_groups import ChannelGroup, ChannelGroups, find_channel_groups
from ghostify.pruning.kept_channels import KeptChannels
from ghostify.pruning.permutation_target import find_permutation_target
from ghostify.pruning.pruning_groups import PruningGroup, conv_after_pruning, kept_by_conv
from ghostify.user_warnings import warn_user


@dataclass(frozen=True)
class GhostRewrite:
    """A convolution that becomes a ghost module.

    Names of modules and nodes are those within the convolution's subgraph. `norm` names the following BatchNorm, whose
    statistics absorb constant shifts; `residual_operand` the node that the output is added to; `activation` the node
    that activates the maps, if ghosts may read activated maps. `permutation_target` is the channel group that the
    ghosts' channel order is pushed into, None if a gather remains. With `kept_channels`, `layout` describes the kept
    maps. MACs are for one output position.
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
    """A convolution or linear layer of a `PruningGroup` that stays as it is but for fewer channels; other fields as in
    `GhostRewrite`."""

    conv: Convolution
    kept_channels: KeptChannels
    norm: str | None
    residual_operand: str | None
    macs_before: int
    macs_after: int


@dataclass(frozen=True)
class Skip:
    """A convolution that is not changed, and the reason: see `skip_reasons`."""

    conv: Convolution
    reason: str


@dataclass(frozen=True)
class PlanTarget:
    """A convolution that may be rewritten, and the rule that targets it."""

    conv: Convolution
    rule: Rule


@dataclass(frozen=True)
class Plan:
    """Every convolution of the program once, in order of first use, then the linear layers that are pruned.

    `macs_*` are totals of the model, where known.

    `macs_limit` is the number of MACs that a budget permits, which the inference form keeps as well. `notes` name what
    the rules allow and the plan does not contain, with the reason. `forecast` is the error of the outputs that is
    expected, from a fit to a part of the calibration images; `measurements` counts the candidates that were simulated
    to choose the plan.
    """

    entries: tuple[GhostRewrite | PruneRewrite | Skip, ...]
    macs_before: int | None = None
    macs_after: int | None = None
    notes: tuple[str, ...] = ()
    macs_limit: int | None = None
    forecast: OutputComparison | None = None
    measurements: int = 0

    @property
    def rewrites(self) -> tuple[GhostRewrite, ...]:
        return tuple(e for e in self.entries if isinstance(e, GhostRewrite))

    @property
    def pruned(self) -> dict[str, KeptChannels]:
        """The kept channels of pruned convolutions and linear layers, by name."""
        return {e.conv.name: e.kept_channels for e in self.changes if e.kept_channels is not None}

    @property
    def changes(self) -> tuple[GhostRewrite | PruneRewrite, ...]:
        return tuple(e for e in self.entries if not isinstance(e, Skip))

    @property
    def skips(self) -> tuple[Skip, ...]:
        return tuple(e for e in self.entries if isinstance(e, Skip))


a_plan = instance_of(Plan, "Pass what plan(program) returns.")


@public(program=a_program, policy=optional(as_policy))
def plan(program: Program, policy: Policy | Rule | None = None) -> Plan:
    """The plan for `program` under `policy` (default: all dense convolutions but the first at ratio 2).

    Raises `GhostifyError` for a pattern that matches no convolution.
    """
    rules = Policy() if policy is None else as_policy("policy", policy)
    return build_plan(program, [_with_layout(t) for t in resolve_targets(program, rules)])


def resolve_targets(program: Program, policy: Policy) -> list[PlanTarget | Skip]:
    """For every convolution the rule that targets it, or the reason why it is skipped.

    Raises `GhostifyError` for a pattern that matches no convolution.
    """
    _check_patterns_match(program, policy)
    return [_target(program, policy, conv, i == 0) for i, conv in enumerate(program.convolutions)]


def build_plan(
    program: Program,
    decisions: Iterable[tuple[PlanTarget, GhostLayout] | Skip],
    kept: Mapping[PruningGroup, tuple[int, ...]] | None = None,
) -> Plan:
    """The plan with these layouts of targets and kept channels of groups; layouts that save no MACs are skipped."""
    subgraphs = {
        path: _Subgraph(GraphIndex(graph), find_channel_groups(graph)) for path, graph in program.subgraphs.items()
    }
    kept_channels = kept_by_conv(program, kept or {})
    entries = [_entry(subgraphs, decision, kept_channels) for decision in decisions]
    entries += [
        _prune(subgraphs[layer.subgraph_path].index, layer, kept_channels[layer.name])
        for layer in program.linear_layers
        if layer.name in kept_channels
    ]
    saved = [_saved_macs(e) for e in entries if not isinstance(e, Skip)]
    before = program.macs
    after = None if before is None or None in saved else before - sum(s for s in saved if s is not None)
    return Plan(tuple(entries), before, after)


def check_plan(program: Program, plan: Plan) -> None:
    """Raises `GhostifyError` where the convolutions of a plan are not those of the program."""
    convs = tuple(entry.conv for entry in plan.entries if entry.conv not in program.linear_layers)
    if convs != program.convolutions:
        raise GhostifyError("plan: is that of another program. Pass plan(program) of this one.")


def warn_if_unchanged(plan: Plan, policy: Policy) -> None:
    """Warn where rules of a ratio above 1 change no convolution, with the most frequent reason."""
    reasons = Counter(skip_reasons.kind_of(skip.reason) for skip in plan.skips)
    is_as_asked = {skip_reasons.RATIO_ONE, skip_reasons.NOT_NEEDED} & reasons.keys()
    if plan.changes or is_as_asked or all(rule.ratio == 1 for rule in policy.rules):
        return
    reason = max(reasons, key=lambda r: (reasons[r], r != skip_reasons.FIRST_CONV), default=None)
    if reason == skip_reasons.UNTRACED_FUNCTION:  # of which tracing warns
        return
    why = "The model contains no two-dimensional convolution." if reason is None else f"Most are skipped for: {reason}."
    warn_user(f"model: no convolution is rewritten. {why}")


def may_prune(program: Program, policy: Policy, conv: Convolution) -> bool:
    """Whether the rule that targets a convolution allows pruning."""
    rule = _rule(program, policy, conv)
    return isinstance(rule, Rule) and rule.prune


def _rule(program: Program, policy: Policy, conv: Convolution) -> Rule | Skip:
    """The first rule that targets a convolution, or the reason why it is skipped."""
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


def _with_layout(target: PlanTarget | Skip) -> tuple[PlanTarget, GhostLayout] | Skip:
    if isinstance(target, Skip):
        return target
    conv, rule = target.conv, target.rule
    if rule.cheap == "auto":
        raise GhostifyError(
            "cheap 'auto': needs a budget. Pass budget={'macs': 0.5} (--budget macs=0.5), "
            "or use depthwise or pointwise."
        )
    if rule.prune:
        raise GhostifyError("prune: needs a budget. Pass budget={'macs': 0.5} (--budget macs=0.5).")
    layouts = layouts_of_ratio(rule, conv.outputs)
    return (target, layouts[0]) if layouts else Skip(conv, why_not_at_ratio(rule, conv))


def layouts_of_ratio(rule: Rule, outputs: int) -> list[GhostLayout]:
    """The layouts of a convolution of so many outputs at the rule's ratio, one for each form of ghost that its `cheap`
    names; none where the ratio leaves no ghosts."""
    intrinsic = intrinsic_count(outputs, rule.ratio_or_default)
    cheap = tuple(NAMED_FORMS) if rule.cheap == "auto" else (rule.cheap,)
    if rule.ratio == 1 or not 1 <= intrinsic < outputs:
        return []
    return [make_layout(outputs, intrinsic, form, rule.dw_size) for form in cheap]


def why_not_at_ratio(rule: Rule, conv: Convolution) -> str:
    """Why a convolution stays dense at the rule's ratio."""
    if rule.ratio == 1:
        return skip_reasons.RATIO_ONE
    layouts = layouts_of_ratio(rule, conv.outputs)
    if not layouts:
        return skip_reasons.no_ghost_maps(rule.ratio_or_default, conv.outputs)
    return skip_reasons.no_macs_saved(cost.conv_macs(conv), min(cost.ghost_macs(conv, x) for x in layouts))


@dataclass(frozen=True)
class _Subgraph:
    """The analyses of one graph."""

    index: GraphIndex
    groups: ChannelGroups


def _rewrite(
    subgraph: _Subgraph, target: PlanTarget, layout: GhostLayout, kept_channels: KeptChannels | None
) -> GhostRewrite | Skip:
    conv = target.conv
    pruned = conv if kept_channels is None else conv_after_pruning(conv, kept_channels)
    dense, after = cost.conv_macs(pruned), cost.ghost_macs(pruned, layout)
    if after >= dense:
        return Skip(conv, skip_reasons.no_macs_saved(dense, after))
    nodes, index = [call.node for call in conv.calls], subgraph.index
    norm = following_norm(index, nodes)
    reads_activated = target.rule.activated and may_read_activated(layout.form)
    return GhostRewrite(
        conv,
        layout,
        norm,
        residual_operand=find_residual_operand(index, nodes, norm),
        activation=following_activation(index, nodes, norm) if reads_activated else None,
        permutation_target=find_permutation_target(index.module, subgraph.groups, nodes),
        macs_before=cost.conv_macs(conv),
        macs_after=after,
        kept_channels=kept_channels,
    )


def _entry(
    subgraphs: Mapping[str, _Subgraph],
    decision: tuple[PlanTarget, GhostLayout] | Skip,
    kept_by_name: Mapping[str, KeptChannels],
) -> GhostRewrite | PruneRewrite | Skip:
    conv = decision.conv if isinstance(decision, Skip) else decision[0].conv
    kept_channels = kept_by_name.get(conv.name)
    if isinstance(decision, Skip) and kept_channels is None:
        return decision
    subgraph = subgraphs[conv.subgraph_path]
    entry = decision if isinstance(decision, Skip) else _rewrite(subgraph, *decision, kept_channels)
    if kept_channels is None or isinstance(entry, GhostRewrite):
        return entry
    return _prune(subgraph.index, conv, kept_channels)


def _prune(index: GraphIndex, conv: Convolution, kept_channels: KeptChannels) -> PruneRewrite:
    nodes = [conv.calls[0].node]
    norm = following_norm(index, nodes)
    before, after = cost.conv_macs(conv), cost.conv_macs(conv_after_pruning(conv, kept_channels))
    return PruneRewrite(conv, kept_channels, norm, find_residual_operand(index, nodes, norm), before, after)


def _saved_macs(entry: GhostRewrite | PruneRewrite) -> int | None:
    """MACs saved over all output positions, None where no shapes are known."""
    output_positions = cost.total_positions(entry.conv.calls)
    return None if output_positions is None else output_positions * (entry.macs_before - entry.macs_after)


def _check_patterns_match(program: Program, policy: Policy) -> None:
    convs = [(c, program.conv(c.name)) for c in program.convolutions if not c.unsupported_reason]
    linear_layers = [(c, program.conv(c.name)) for c in program.linear_layers if not c.unsupported_reason]
    for rule in policy.rules:
        layers = [*convs, *linear_layers] if rule.prune else convs
        for key in ("targets", "ignore"):
            for pattern in getattr(rule, key):
                single = Rule(targets=(pattern,))
                if pattern == "*" or any(single.matches(c.name, m, c.conv_class) for c, m in layers):
                    continue
                if isinstance(pattern, str) and any(pattern == c.name for c in program.convolutions):
                    continue
                names = ", ".join(c.name for c, _ in convs[:3])
                remedy = f"Choose from {names}, ... (`ghostify plan` lists all)." if convs else "Leave it out."
                raise GhostifyError(
                    f"{key} {pattern!r}: matches no convolution of {type(program.module).__name__}. {remedy}"
                )
