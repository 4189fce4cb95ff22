"""Obstacles: why the channels of a group cannot be permuted or pruned."""

from __future__ import annotations

REACH_OUTPUT = "the channels reach the output"
COUNT_READ = "the number of channels is read"
NO_BATCH = "the output of a convolution has no batch dimension"
NO_CONSUMER = "no convolution or linear layer reads the channels"

CONSTANT_COUNT = "{} has the number of channels as a constant"
MIXED = "{} may mix channels"
ORIGINAL_ORDER = "{} reads the channels in the original order"
METHOD_BOUNDARY = "the method {} starts or ends at them"
FUNCTION_INPUT = "the function {} reads the channels"

CALLED_REPEATEDLY = "{} is called several times"
HAS_HOOKS = "{} has hooks"
SHARED_WEIGHTS = "{} shares its weights"
FUNCTION_WEIGHT = "{} is the weight of a function call"
GROUPED = "{} convolves in groups"
MANY_GROUPS = "{} reads more than {} groups of channels"
COMPUTED_WEIGHTS = "{} is of a class that computes its weights"
