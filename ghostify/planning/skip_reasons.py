"""Why planning leaves a convolution or a channel group unchanged: every reason, as "kind" or "kind: details".

A convolution that cannot be rewritten at all has the reason that tracing found (`Convolution.unsupported_reason`).
"""

from __future__ import annotations

FIRST_CONV = "first convolution (keep_first)"
NOT_TARGETED = "not targeted by any rule"
IGNORED = "ignored by its rule"
DEPTHWISE = "depthwise convolution"
RATIO_ONE = "ratio 1"
NOT_NEEDED = "not needed for the budget"

NO_GROUP_PRUNED = "no channel group can be pruned"
CONSUMERS_NOT_REACHED = "no calibration image reaches all convolutions that read them"


def grouped(groups: int) -> str:
    """A grouped convolution; only dense ones are rewritten."""
    return f"grouped convolution: {groups} groups"


def no_ghost_maps(ratio: float, outputs: int) -> str:
    """The ratio leaves no ghost map, or no intrinsic map, of so few outputs."""
    return f"no ghost maps at ratio {ratio:g}: {outputs} output{'s' * (outputs != 1)}"


def no_macs_saved(macs_before: int, macs_after: int) -> str:
    """The ghost module needs as many MACs per output position as the convolution, or more."""
    return f"no MACs saved: {macs_before} per output position before, {macs_after} after"


def not_prunable(conv: str) -> str:
    """No rule with `prune` targets a convolution of the channel group."""
    return f"no rule allows pruning {conv}"


def kind_of(reason: str) -> str:
    """The reason without its details."""
    return reason.partition(": ")[0]
