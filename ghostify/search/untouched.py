"""What a budget cannot touch: convolutions that stay as they are, their share of the MACs, and what they would save."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ghostify import skip_reasons
from ghostify.graph.program import Convolution, Program
from ghostify.modules.layout import intrinsic_count, make_layout
from ghostify.planning import cost
from ghostify.planning.planner import Skip

ALLOWED_RATIO = 8
MIN_SHARE = 0.02
MAX_NAMES = 3

REMEDIES = {
    skip_reasons.FIRST_CONV: "pass targets='*' (--target '*', or keep_first = false in a policy)",
    skip_reasons.NOT_TARGETED: "extend targets",
    skip_reasons.IGNORED: "shorten ignore",
}


@dataclass(frozen=True)
class Untouched:
    """Convolutions that a plan cannot change for one reason: the kind of it, and their share of the model's MACs.

    `gain` is the share that rewriting all of them to pointwise ghosts at `ALLOWED_RATIO` would save; 0 where the user
    cannot allow it.
    """

    reason: str
    names: tuple[str, ...]
    share: float
    gain: float

    def __str__(self) -> str:
        more = f" and {len(self.names) - MAX_NAMES} more" if len(self.names) > MAX_NAMES else ""
        keep = "keeps" if len(self.names) == 1 else "keep"
        text = f"{self.reason}: {', '.join(self.names[:MAX_NAMES])}{more} {keep} {_percent(self.share)} of the MACs"
        return f"{text}; to save up to {_percent(self.gain)} there, {REMEDIES[self.reason]}" if self.gain else text


def find_untouched(program: Program, skips: Iterable[Skip]) -> list[Untouched]:
    """The skipped convolutions by reason, those of most MACs first; none without shapes, of less than `MIN_SHARE`, or
    that a plan leaves as they are by its own choice."""
    by_reason = defaultdict[str, list[Convolution]](list)
    for skip in skips:
        by_reason[skip_reasons.kind_of(skip.reason)].append(skip.conv)
    for chosen in skip_reasons.CHOSEN_BY_PLAN:
        by_reason.pop(chosen, None)
    parts = []
    for reason, convs in by_reason.items():
        before, after = sum(map(_macs, convs)), sum(map(_least_macs, convs))
        share = before / program.macs if program.macs else 0.0
        if share >= MIN_SHARE:
            gain = share * (1 - after / before) if reason in REMEDIES else 0.0
            parts.append(Untouched(reason, tuple(conv.name for conv in convs), share, gain))
    return sorted(parts, key=lambda untouched: -untouched.share)


def _macs(conv: Convolution) -> int:
    return cost.conv_macs(conv) * (cost.total_positions(conv.calls) or 0)


def _least_macs(conv: Convolution) -> int:
    """The MACs at `ALLOWED_RATIO`, those of the convolution where a ghost module has more."""
    if conv.groups > 1 or conv.outputs == 1:
        return _macs(conv)
    layout = make_layout(conv.outputs, intrinsic_count(conv.outputs, ALLOWED_RATIO), "pointwise", 1)
    return min(_macs(conv), cost.ghost_macs(conv, layout) * (cost.total_positions(conv.calls) or 0))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
