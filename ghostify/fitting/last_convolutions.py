"""The outputs of convolutions with gradients, and the convolutions whose outputs reach no other convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ConvOutput:
    """The output of one call of a convolution: `before` adding `zero`, with respect to which gradients are taken, and
    after it."""

    name: str
    before: Tensor
    zero: Tensor
    after: Tensor


def followed_convolutions(calls: Sequence[ConvOutput]) -> set[str]:
    """The convolutions of which a call's output is among the inputs of another call, by the graph of gradients."""
    names = {call.zero: call.name for call in calls}
    pending: list[Any] = [call.before.grad_fn for call in calls]
    followed, visited = set[str](), set[Any]()
    while pending:
        function = pending.pop()
        if function is None or function in visited:
            continue
        visited.add(function)
        variable = getattr(function, "variable", None)  # of a leaf
        if variable is not None and variable in names:
            followed.add(names[variable])
        pending += [following for following, _ in function.next_functions]
    return followed
