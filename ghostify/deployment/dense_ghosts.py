"""Ghost modules that can become two dense convolutions, and the multiply-accumulates that this adds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ghostify.deployment.folding import can_be_dense
from ghostify.graph.executor import Values, execute
from ghostify.graph.inputs import PlaceholderValues, cloned
from ghostify.planning.cost import count_macs
from ghostify.summary import REPORT_KEY, ConversionInfo


@dataclass(frozen=True)
class DenseCandidate:
    """A ghost module that can become two dense convolutions: its path, intrinsic maps, and the MACs that this adds."""

    path: str
    intrinsic: int
    added_macs: int


def mac_allowance(model: nn.Module, example: Any) -> float:
    """The MACs that the inference form may add to the model's for these inputs: infinite unless a budget limits them.

    The limit is for the inputs of the conversion; for others it is scaled with the model's MACs.
    """
    info = model.__dict__.get("meta", {}).get(REPORT_KEY)
    report = info.report if isinstance(info, ConversionInfo) else None
    if report is None or report.macs_limit is None or not report.macs_after:
        return math.inf
    return count_macs(model, example) * (report.macs_limit / report.macs_after - 1)


def dense_candidates(subgraph: fx.GraphModule, inputs: PlaceholderValues) -> list[DenseCandidate]:
    """The ghost modules of a subgraph that can become two dense convolutions: each ghost then reads what the intrinsic
    maps are copied from, m MACs for each intrinsic map and position."""
    intrinsic = {path: m.primary_conv.out_channels for path, m in subgraph.named_modules() if can_be_dense(m)}
    positions = dict.fromkeys(intrinsic, 0)

    def record(node: fx.Node, value: Any, _: Values) -> Any:
        if node.op == "call_module" and node.target in positions and isinstance(value, Tensor):
            positions[str(node.target)] += value.numel() // value.shape[1]
        return value

    if intrinsic:
        execute(subgraph, cloned(inputs.values), record)
    return [DenseCandidate(path, count, count * count * positions[path]) for path, count in intrinsic.items()]


def within_allowance(candidates: Iterable[DenseCandidate], allowance: float) -> dict[str, int]:
    """The candidates, those that add least first, as long as they add at most `allowance` together; their MACs by
    path."""
    chosen: dict[str, int] = {}
    for candidate in sorted(candidates, key=lambda c: c.added_macs):
        if candidate.added_macs <= allowance:
            chosen[candidate.path] = candidate.added_macs
            allowance -= candidate.added_macs
    return chosen
