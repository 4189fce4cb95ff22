"""`ghostify`: the stages composed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ghostify.deprecation import renamed_keywords
from ghostify.errors import GhostifyError
from ghostify.fitting.driver import ProgressCallback, fit
from ghostify.fitting.sensitivity import prepare_calibration
from ghostify.graph.tracing import trace
from ghostify.planning.planner import plan
from ghostify.planning.policy import Pattern, Policy, Rule, as_patterns
from ghostify.reconstruction.blockwise import reconstruct_blocks
from ghostify.rewriting.apply import rewrite
from ghostify.search.budget import plan_for_budget
from ghostify.search.pareto import Evaluate, plan_for_drop
from ghostify.summary import attach_report, build_report


@renamed_keywords(narrow="prune", progress="on_progress")
def ghostify(
    model: nn.Module,
    ratio: float = 2,
    *,
    dw_size: int = 3,
    cheap: str | int = "depthwise",
    activated: bool = False,
    prune: bool = False,
    targets: Pattern | Iterable[Pattern] | None = None,
    ignore: Pattern | Iterable[Pattern] | None = None,
    policy: Policy | None = None,
    budget: Mapping[str, float] | None = None,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    evaluate: Evaluate | None = None,
    runtime: str = "eager",
    reconstruct: bool = False,
    seed: int = 0,
    on_progress: ProgressCallback | None = None,
) -> nn.Module:
    """A copy of `model` whose dense convolutions are ghost modules, at about 1 / `ratio` of the multiply-accumulates.

    `ratio`, `dw_size`, `cheap`, `activated`, `prune`, `targets` and `ignore` make up one `Rule` (see there); `policy`
    replaces them. Without targets, every dense convolution but the first is rewritten. A `budget` such as
    {"macs": 0.5} - a share of the original's up to 1, a number above; also "params", and "latency", measured on this
    machine in `runtime` ("eager", "compile", "onnx", "openvino", "aotinductor") - replaces the ratio by one for each
    layer, and needs `example_inputs`. With {"max_drop": 0.5} it is as cheap as `evaluate`, which says how good a model
    is, allows: at most so far below the original (see `plan_for_drop`).
    `calibration` yields batches, in whatever form the model's forward takes; each layer is then fitted to the
    original's outputs on them, otherwise the fit is data-free. `reconstruct` then takes gradient steps, block by block,
    towards the original's outputs on the same batches. `example_inputs` adds shapes and MACs to the report. Raises
    `GhostifyError`.
    """
    if reconstruct and calibration is None:
        raise GhostifyError("reconstruct needs images: pass calibration, a few hundred unlabelled ones")
    if policy is None:
        chosen = ("*",) if targets is None else as_patterns(targets, "targets")
        ignored = () if ignore is None else as_patterns(ignore, "ignore")
        policy = Policy((Rule(chosen, ignored, ratio, dw_size, cheap, activated, prune),), keep_first=targets is None)
    elif targets is not None or ignore is not None:
        raise GhostifyError("targets and ignore belong into the rules of the policy: pass either, not both")
    if reconstruct and any(rule.prune for rule in policy.rules):
        raise GhostifyError(
            "reconstruct compares maps with the original's, which narrow leaves out: choose one of them"
        )
    program = trace(model, example_inputs)
    seen = None if calibration is None else prepare_calibration(program, calibration, seed)
    if budget is not None and "max_drop" in budget:
        if evaluate is None:
            raise GhostifyError("budget max_drop needs to know how good a model is: pass evaluate, or --validation")
        decided, fits = plan_for_drop(
            program, policy, budget, evaluate, seen, seed=seed, runtime=runtime, on_progress=on_progress
        )
    else:
        decided = (
            plan(program, policy) if budget is None else plan_for_budget(program, policy, budget, seen, seed, runtime)
        )
        fits = fit(program, decided, seen, seed=seed, on_progress=on_progress)
    done = None
    if reconstruct and seen is not None:
        fits, done = reconstruct_blocks(program, decided, fits, seen.batches, seed=seed, on_progress=on_progress)
    return attach_report(
        rewrite(program, decided, fits.weights), build_report(decided, fits, done, program.missing_attributes)
    )
