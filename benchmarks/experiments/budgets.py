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
    architectures = torchvision.models.list_models(module=torchvision.models)

    def size(name: str) -> int:
        return torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]

    return sorted((n for n in architectures if not n.startswith(others)), key=size)


def tightest_plan(model: nn.Module, x: torch.Tensor, timer: LatencyTimer) -> tuple[Row, Plan, Program]:
    """The tightest feasible budget with the minimum share, the plan for it, and the program."""
    program = trace(model, x)
    space = build_search_space(program, POLICY, ("latency",), None, 0, timer)
    for budget in BUDGETS:
        try:
            chosen_plan = select_plan(space, {"latency": budget}).plan
        except GhostifyError:
            continue
        return {"budget": budget, "reach": space.minimum_shares["latency"]}, chosen_plan, program
    return (
        {"budget": None, "reach": space.minimum_shares["latency"]},
        plan(program, Policy((Rule(ratio=1),))),
        program,
    )


def rows(only: str, runtime: str, previous_rows: list[Row]) -> Iterator[Row]:
    yield from previous_rows
    finished = {row["how"] for row in previous_rows}
    for name in (n for n in names() if only in n and n not in finished):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        x = torch.rand(1, 3, SIZES.get(name, 224), SIZES.get(name, 224))
        with LatencyTimer(runtime) as timer:
            facts, chosen_plan, program = tightest_plan(model, x, timer)
            small = rewrite(program, chosen_plan, untrained_weights(program, chosen_plan, shuffled=True))
            before, after = timer.latencies_ms([deploy(model, x), deploy(small, x)], [x, x], ROUNDS)
        macs = [chosen_plan.macs_before, chosen_plan.macs_after]
        yield {"how": name, **facts, "rewritten": len(chosen_plan.rewrites), "macs": macs, "ms": [before, after]}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", default="", help="models with this in their names")
    parser.add_argument("--runtime", default="eager", choices=RUNTIMES)
    arguments = parser.parse_args()
    name = f"budgets-{arguments.runtime}"
    measured = rows(arguments.only, arguments.runtime, recorded(name))
    publish(name, measured, COLUMNS, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
