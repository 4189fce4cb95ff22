"""Why a convolution or a channel group is not changed: every reason in a report, as "kind" or "kind: details".

The first reasons are those of tracing: the convolution cannot be rewritten at all. The others are those of planning and
of the search. Why the channels of a group are fixed is said in `pruning/obstacles.py`.
"""

from __future__ import annotations

import torch
from torch import nn

NOT_IN_GRAPH = "not called in the traced forward"
NOT_EXECUTED = "not called when the example inputs run"
UNTRACED_FUNCTION = "functional call in a forward that does not trace"
COMPUTED_WEIGHT = "weight computed in the forward"
DIFFERENT_SETTINGS = "one weight with different strides, paddings or biases"
SHARED_WEIGHT = "weight shared with another module or call"
HAS_HOOKS = "has hooks"

# details of an unsupported class
FAILS_ALONE = "its forward fails outside the model"
NOT_ONE_CONVOLUTION = "its forward is not one convolution"
TRANSFORMED_INPUT = "it transforms its input"
INPUT_DEPENDENT_WEIGHT = "its weight depends on its input"

FIRST_CONV = "first convolution (keep_first)"
NOT_TARGETED = "not targeted by any rule"
IGNORED = "ignored by its rule"
DEPTHWISE = "depthwise convolution"
RATIO_ONE = "ratio 1"
NOT_NEEDED = "not needed for the budget"

NO_MACS_SAVED = "no MACs saved"
CHOSEN_BY_PLAN = (RATIO_ONE, NOT_NEEDED, NO_MACS_SAVED)

NO_GROUP_PRUNED = "no channel group can be pruned"
CONSUMERS_NOT_REACHED = "no calibration image reaches all convolutions that read them"


def unsupported_class(conv: nn.Conv2d, detail: str) -> str:
    """The reason for a subclass of `Conv2d` that is not equivalent to a standard convolution."""
    return f"unsupported class: {type(conv).__module__}.{type(conv).__name__}, {detail}"


def unsupported_dtype(dtype: torch.dtype) -> str:
    """The reason for a weight that is not real floating point."""
    return f"unsupported weight dtype: {dtype}"


def grouped(groups: int) -> str:
    """A grouped convolution; only dense ones are rewritten."""
    return f"grouped convolution: {groups} groups"


def no_ghost_maps(ratio: float, outputs: int) -> str:
    """The ratio leaves no ghost map, or no intrinsic map, of so few outputs."""
    return f"no ghost maps at ratio {ratio:g}: {outputs} output{'s' * (outputs != 1)}"


def no_macs_saved(macs_before: int, macs_after: int) -> str:
    """The ghost module needs as many MACs per output position as the convolution, or more."""
    return f"{NO_MACS_SAVED}: {macs_before} per output position before, {macs_after} after"


def not_prunable(conv: str) -> str:
    """No rule with `prune` targets a convolution of the channel group."""
    return f"no rule allows pruning {conv}"


def kind_of(reason: str) -> str:
    """The reason without its details."""
    return reason.partition(": ")[0]
