"""`ghostify()`: trace, plan, fit and rewrite a model in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn

from ghostify.arguments import a_flag, a_function, a_model, a_seed, anything, optional, public
from ghostify.deprecation import renamed_keywords
from ghostify.errors import GhostifyError
from ghostify.fitting.driver import ProgressCallback, fit
from ghostify.fitting.output_errors import compare_outputs
from ghostify.fitting.output_scale import Importance
from ghostify.fitting.sensitivity import a_calibration, prepare_optional
from ghostify.graph.tracing import trace
from ghostify.healing.distillation import heal as heal_model
from ghostify.healing.settings import Healing, a_healing
from ghostify.planning.planner import plan, warn_if_unchanged
from ghostify.planning.policy import DEFAULT_RATIO, Pattern, Policy, Rule, as_policy
from ghostify.reconstruction.blockwise import reconstruct_blocks
from ghostify.rewriting.apply import rewrite
from ghostify.runtimes.registry import a_runtime
from ghostify.search.budget import a_budget, plan_for_budget
from ghostify.search.forecast import forecast_of, with_forecast
from ghostify.search.pareto import Evaluate, plan_for_drop
from ghostify.summary import attach_report, build_report


@renamed_keywords(narrow="prune", progress="on_progress")
@public(
    model=a_model,
    ratio=anything,  # these are checked by Rule
    dw_size=anything,
    cheap=anything,
    activated=anything,
    prune=anything,
    targets=anything,
    ignore=anything,
    policy=optional(as_policy),
    budget=optional(a_budget),
    example_inputs=anything,
    calibration=optional(a_calibration),
    evaluate=optional(a_function("model")),
    importance=optional(a_function("outputs")),
    runtime=a_runtime,
    reconstruct=a_flag,
    heal=optional(a_healing),
    seed=a_seed,
    on_progress=optional(a_function("done", "total", "text")),
)
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
    policy: Policy | Rule | None = None,
    budget: Mapping[str, float] | None = None,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    evaluate: Evaluate | None = None,
    importance: Importance | None = None,
    runtime: str = "eager",
    reconstruct: bool = False,
    heal: float | Healing | None = None,
    seed: int = 0,
    on_progress: ProgressCallback | None = None,
) -> nn.Module:
    """A copy of `model` with ghost modules for dense convolutions, at about 1 / `ratio` of the multiply-accumulates.

    `ratio`, `dw_size`, `cheap`, `activated`, `prune`, `targets` and `ignore` form one `Rule` (see there); a `policy`,
    or one `Rule`, replaces them. By default, every dense convolution but the first is rewritten.

    A `budget` such as {"macs": 0.5} replaces `ratio` by one for each layer, and needs `example_inputs`; rules of a
    `policy` that have a ratio keep it. Its keys are
    "macs", "params" and "latency": values up to 1 are shares of the original's, larger ones numbers (milliseconds for
    "latency"). Latency is measured on this machine in `runtime` ("eager", "compile", "onnx", "openvino",
    "aotinductor"). {"max_drop": 0.5} selects the cheapest model whose score by `evaluate(model)` is at most 0.5 below
    that of the original (see `plan_for_drop`).

    `calibration` yields batches: tensors, tuples or dicts for the arguments that `example_inputs` fills (without
    it, those without default); further elements of a tuple, such as labels, are dropped. Each layer is fitted to
    the original's outputs on them; without them, the fit is data-free. With `reconstruct`, gradient steps on the
    same batches follow, block by block. `heal` takes gradient steps on the whole result, for so many seconds or as
    a `Healing` says; they are kept where they lower the error of the outputs on the holdout. `importance(outputs)`
    returns the tensor of the model's outputs, or several, whose errors count (default: all, each channel relative
    to its own variance over images); gradients must flow through it. `example_inputs` adds shapes and MACs to the
    report. `on_progress(done, total, text)` is called during the fit. The same inputs and `seed` give the same
    result, whatever modes, defaults and random states the caller has set (see `neutral_context`); only `evaluate`
    runs in the caller's modes. Raises `GhostifyError`, also where a function that was passed fails, except for
    `on_progress`: what it raises ends the conversion.
    """
    if reconstruct and calibration is None:
        raise GhostifyError("reconstruct: needs images. Pass calibration (--calibration FOLDER).")
    if heal is not None and calibration is None:
        raise GhostifyError("heal: needs images. Pass calibration (--calibration FOLDER).")
    selected, ignored = ("*" if targets is None else targets), (() if ignore is None else ignore)
    rule = Rule(selected, ignored, ratio, dw_size, cheap, activated, prune)  # type: ignore[arg-type]
    is_default = rule == Rule(ratio=DEFAULT_RATIO) and targets is None
    if policy is None:
        policy = Policy((rule if budget is None else replace(rule, ratio=None),), keep_first=targets is None)
    elif not is_default:
        names = ", ".join(field.name for field in fields(Rule))
        raise GhostifyError(f"{names}: are set in the rules of the policy. Pass either, not both.")
    policy = as_policy("policy", policy)
    if reconstruct and any(rule.prune for rule in policy.rules):
        raise GhostifyError("reconstruct: does not support pruned channels. Pass either reconstruct or prune.")
    program = trace(model, example_inputs)
    prepared = prepare_optional(program, calibration, seed, importance)
    if budget is not None and "max_drop" in budget:
        if evaluate is None:
            raise GhostifyError("budget max_drop: needs the model's score. Pass evaluate (--validation FOLDER).")
        planned, fits = plan_for_drop(
            program, policy, budget, evaluate, prepared, seed=seed, runtime=runtime, on_progress=on_progress
        )
        if prepared is not None:
            planned = replace(planned, forecast=forecast_of(program, planned, prepared, seed))
    else:
        if budget is not None:
            planned = plan_for_budget(program, policy, budget, prepared, seed, runtime)
        else:
            planned = plan(program, policy)
            planned = planned if prepared is None else with_forecast(program, planned, prepared, seed)
        fits = fit(program, planned, prepared, seed=seed, on_progress=on_progress)
    warn_if_unchanged(planned, policy)
    reconstruction = None
    if reconstruct and prepared is not None:
        fits, reconstruction = reconstruct_blocks(
            program, planned, fits, prepared.batches, seed=seed, on_progress=on_progress
        )
    converted, healing = rewrite(program, planned, fits.weights), None
    if isinstance(heal, Healing) and prepared is not None:
        healing = heal_model(program.module, converted, prepared, heal, seed=seed, on_progress=on_progress)
    measured = None if prepared is None else compare_outputs(program.module, converted, prepared)
    return attach_report(
        converted, build_report(planned, fits, reconstruction, program.missing_attributes, measured, healing)
    )
