"""Why a convolution cannot be rewritten at all: every reason that tracing gives, as "kind" or "kind: details"."""

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


def unsupported_class(conv: nn.Conv2d, detail: str) -> str:
    """The reason for a subclass of `Conv2d` that is not equivalent to a standard convolution."""
    return f"unsupported class: {type(conv).__module__}.{type(conv).__name__}, {detail}"


def unsupported_dtype(dtype: torch.dtype) -> str:
    """The reason for a weight that is not real floating point."""
    return f"unsupported weight dtype: {dtype}"
