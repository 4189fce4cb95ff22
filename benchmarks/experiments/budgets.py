"""Every torchvision classifier with convolutions under a latency budget: none may become slower.

    python benchmarks/experiments/budgets.py
    python benchmarks/experiments/budgets.py --only mobilenet --runtime onnx

The budgets are tried from the tightest on until one is feasible for the model's layers on this machine; each layer is
pointwise, depthwise or unchanged. If none is, the plan leaves the model unchanged. Then original and result, both in
inference form, are timed again: medians of 30 forwards each, interleaved. Weights are random, since time does not
depend on them; images are 224 x 224 (299 for Inception). Resumes after an interruption; results go to
benchmarks/results/budgets-RUNTIME.json.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.catalogue import BUDGETS as COLUMNS
from benchmarks.lib.tables import Row, options, publish, recorded
from ghostify import GhostifyError, Policy, Rule, plan, rewrite, trace
from ghostify.deployment.inference_form import deploy
from ghostify.fitting.initialization import untrained_weights
from ghostify.graph.program import Program
from ghostify.planning.planner import Plan
from ghostify.runtimes.registry import RUNTIMES
from ghostify.search.budget import build_search_space, select_plan
from ghostify.timing.timer import LatencyTimer

BUDGETS = (0.7, 0.8, 0.9, 0.95)
POLICY = Policy((Rule(cheap="auto"),))
ROUNDS = 30
SIZES = {"inception_v3": 299}


def names() -> list[str]:
    """Classifiers whose work is in convolutions, small ones first."""
    others = ("vit", "swin", "maxvit")
    found = torchvision.models.list_models(module=torchvision.models)

    def size(name: str) -> int:
        return torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]

    return sorted((n for n in found if not n.startswith(others)), key=size)


def decided(model: nn.Module, x: torch.Tensor, clock: LatencyTimer) -> tuple[Row, Plan, Program]:
    """The tightest budget in reach, its plan, and what it makes of the model."""
    program = trace(model, x)
    choices = build_search_space(program, POLICY, ("latency",), None, 0, clock)
    for budget in BUDGETS:
        try:
            made = select_plan(choices, {"latency": budget}).plan
        except GhostifyError:
            continue
        return {"budget": budget, "reach": choices.minimum_shares["latency"]}, made, program
    return (
        {"budget": None, "reach": choices.minimum_shares["latency"]},
        plan(program, Policy((Rule(ratio=1),))),
        program,
    )


def rows(only: str, runtime: str, known: list[Row]) -> Iterator[Row]:
    yield from known
    done = {row["how"] for row in known}
    for name in (n for n in names() if only in n and n not in done):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        x = torch.rand(1, 3, SIZES.get(name, 224), SIZES.get(name, 224))
        with LatencyTimer(runtime) as clock:
            facts, made, program = decided(model, x, clock)
            small = rewrite(program, made, untrained_weights(program, made, shuffled=True))
            before, after = clock.latencies_ms([deploy(model, x), deploy(small, x)], [x, x], ROUNDS)
        macs = [made.macs_before, made.macs_after]
        yield {"how": name, **facts, "rewritten": len(made.rewrites), "macs": macs, "ms": [before, after]}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", default="", help="models with this in their names")
    parser.add_argument("--runtime", default="eager", choices=RUNTIMES)
    arguments = parser.parse_args()
    name = f"budgets-{arguments.runtime}"
    found = rows(arguments.only, arguments.runtime, recorded(name))
    publish(name, found, COLUMNS, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
