"""Weights of a plan's ghost modules and pruned convolutions: data-free, or layer by layer on calibration images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import fx, nn

from ghostify.arguments import a_function, a_seed, instance_of, optional, public
from ghostify.deprecation import renamed_keywords
from ghostify.errors import GhostifyError
from ghostify.fitting import lstsq, patches
from ghostify.fitting.bn_statistics import ChannelStats, input_channel_stats
from ghostify.fitting.calibration import CalibrationBatches
from ghostify.fitting.data_free import data_free_statistics
from ghostify.fitting.depthwise_statistics import AssignedStatistics, PerMapStatistics
from ghostify.fitting.ghost_fit import GhostFit, has_many_maps, to_ghost_weights
from ghostify.fitting.lockstep import LockstepRun
from ghostify.fitting.lstsq import DEFAULT_METHOD, FitMethod, JointStatistics
from ghostify.fitting.output_scale import Importance
from ghostify.fitting.pruned_fit import PrunedConvFit
from ghostify.fitting.row_sample import MAX_MOMENT_FEATURES, needs_rows, sampled_rows_for
from ghostify.fitting.sensitivity import (
    PreparedCalibration,
    Sensitivity,
    a_calibration,
    channel_weights,
    prepare_optional,
)
from ghostify.fitting.stage_timer import StageTimer
from ghostify.fitting.subgraph_inputs import collect_subgraph_inputs
from ghostify.graph.batchnorm import BatchNorm, batchnorm_at
from ghostify.graph.program import Program, a_program, get_subgraph
from ghostify.modules.ghost import GhostWeights
from ghostify.modules.hooks import has_hooks
from ghostify.numerics import error_scales
from ghostify.planning.planner import GhostRewrite, Plan, PruneRewrite, a_plan, check_plan
from ghostify.pruning.pruning_groups import conv_after_pruning
from ghostify.pruning.slicing import slice_conv, slice_norm
from ghostify.rewriting.apply import FittedWeights, insert_fitted, insert_pruned, rewrite_subgraph
from ghostify.user_warnings import warn_user

OVERFIT_RATIO = 1.5
OVERFIT_MIN_ERROR = 0.02
NOTED_RATIO = 1.1

ProgressCallback = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class FitResult:
    """Weights by convolution name, the number of calibration images (0: data-free), and the seconds by stage.

    `notes` say what more images would bring, and where errors are not weighed by the outputs. They name the layers that
    are fitted to fewer rows than others, and those whose weights come from the filters alone since the fit to the
    images was worse.
    """

    weights: Mapping[str, FittedWeights]
    images: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def ghost(self, name: str) -> GhostWeights:
        """The weights of a convolution that is rewritten to a ghost module."""
        weights = self.weights[name]
        assert isinstance(weights, GhostWeights)
        return weights


def fit_weights(program: Program, plan: Plan, calibration: PreparedCalibration, seed: int) -> dict[str, FittedWeights]:
    """The weights of `fit` on prepared calibration images, without its warnings and notes."""
    run = _FitRun(program, plan, seed, None, DEFAULT_METHOD)
    with torch.no_grad():
        run.fit_subgraphs(calibration)
    return run.weights


@renamed_keywords(progress="on_progress")
@public(
    program=a_program,
    plan=a_plan,
    calibration=optional(a_calibration),
    seed=a_seed,
    on_progress=optional(a_function("done", "total", "text")),
    method=instance_of(FitMethod, "Leave it out."),
    importance=optional(a_function("outputs")),
)
def fit(
    program: Program,
    plan: Plan,
    calibration: Iterable[Any] | PreparedCalibration | None = None,
    *,
    seed: int = 0,
    on_progress: ProgressCallback | None = None,
    method: FitMethod = DEFAULT_METHOD,
    importance: Importance | None = None,
) -> FitResult:
    """Fit every rewrite of `plan`: data-free without `calibration`, else to the original's outputs on its batches.

    `calibration` yields batches for the arguments that the program's example inputs fill (without them, those without
    default); further elements of a tuple, such as labels, are dropped. In a `torch.distributed` process group every
    process passes the whole set, computes its share, and returns the same weights. Raises `GhostifyError` for an empty
    calibration set, or one with values that are not finite; warns where the error on the holdout is much larger than on
    the other images. `method` replaces steps of the fit in ablations; `importance` is that of `ghostify`.
    """
    check_plan(program, plan)
    run = _FitRun(program, plan, seed, on_progress, method)
    prepared = prepare_optional(program, calibration, seed, importance)
    if prepared is None:
        for name in plan.pruned:
            raise GhostifyError(f"{name}: pruning needs calibration images. Pass calibration (--calibration FOLDER).")
        with run.timer("solving"):
            weights = {e.conv.name: run.fit_data_free(e) for e in plan.rewrites}
        return FitResult(weights, 0, run.timer.seconds)
    run.timer.seconds["sensitivity"] = prepared.seconds
    with torch.no_grad():
        run.fit_subgraphs(prepared)
    _warn_if_overfit(run.weights, prepared.batches)
    notes = [*prepared.notes, *_note_on_images(run.weights)]
    notes += [_note_on_rows(e) for e in run.fitted if needs_rows(_features(e))]
    notes += [
        f"{name}: its weights are those without images: fitted to the images, it has a larger error on the holdout"
        for name, w in run.weights.items()
        if w.fit_error is None and w.holdout_error is not None
    ]
    return FitResult(run.weights, prepared.batches.images, run.timer.seconds, tuple(notes))


class _FitRun:
    """One run of `fit`: the weights so far, and the seconds by stage."""

    def __init__(
        self, program: Program, plan: Plan, seed: int, progress: ProgressCallback | None, method: FitMethod
    ) -> None:
        self.program, self.plan, self.seed, self.method = program, plan, seed, method
        self.progress: ProgressCallback = progress or (lambda *_: None)
        self.timer = StageTimer()
        self.weights: dict[str, FittedWeights] = {}
        self.fitted = [e for e in plan.changes if isinstance(e, GhostRewrite) or e.conv.groups == 1]
        self.input_stats = cache(lambda path: input_channel_stats(program.subgraphs[path]))

    def fit_data_free(self, entry: GhostRewrite) -> GhostWeights:
        """Data-free weights of one layer."""
        subgraph, conv = self.program.subgraphs[entry.conv.subgraph_path], self.program.conv(entry.conv.name)
        norm = batchnorm_at(subgraph, entry.norm)
        inputs = self.input_stats(entry.conv.subgraph_path).get(entry.conv.calls[0].node)
        if entry.kept_channels is not None:
            kept_out, kept_in = entry.kept_channels.kept_out, entry.kept_channels.kept_in
            conv = slice_conv(conv, kept_out, kept_in)
            norm = norm if norm is None or kept_out is None else slice_norm(norm, kept_out)
            inputs = inputs if kept_in is None else None
        return fit_data_free(conv, entry, norm, inputs, self.method)

    def fit_subgraphs(self, calibration: PreparedCalibration) -> None:
        """Fit one subgraph after another, inner ones first, each on the inputs that the converted model gives it."""
        changed_paths = [p for p in self.program.subgraphs if any(e.conv.subgraph_path == p for e in self.plan.changes)]
        converted = self.program.module if changed_paths == [""] else copy.deepcopy(self.program.module)
        for path in changed_paths:
            batches: CalibrationBatches | None = calibration.batches
            if path or has_hooks(self.program.module):  # which may change the model's own inputs
                with self.timer("forward"):
                    batches = collect_subgraph_inputs(self.program, converted, path, calibration.batches)
            if batches is None:
                self._fit_unreached(path)
            else:
                self._fit_subgraph(path, get_subgraph(converted, path), batches, calibration.sensitivity)
            if path != changed_paths[-1]:
                rewrite_subgraph(converted, path, self.plan, self.weights)
        self.progress(len(self.weights), len(self.fitted), "")

    def _fit_subgraph(
        self, path: str, converted: fx.GraphModule, batches: CalibrationBatches, sensitivity: Sensitivity
    ) -> None:
        """Fit the layers of one subgraph, one after another, in one lockstep run of both models."""
        subgraph, timer = self.program.subgraphs[path], self.timer
        entries = {call.node: e for e in self.fitted if e.conv.subgraph_path == path for call in e.conv.calls}
        changed = self._changed_nodes(path)
        lockstep = LockstepRun(subgraph, batches.local_batches, set(entries), changed, converted=converted)
        for change in self.plan.changes:
            if change.conv.subgraph_path == path:
                insert_pruned(lockstep.converted, change)
        layer_fits: dict[str, GhostFit | PrunedConvFit] = {}
        for node, states in timer.time_items("forward", lockstep.steps()):
            entry = entries[node.name]
            name = entry.conv.name
            self.progress(len(self.weights), len(self.fitted), name)
            if name not in layer_fits:
                args = lockstep, sensitivity.get(name), batches.images, self.seed, self.method
                layer_fits[name] = (
                    GhostFit(entry, *args) if isinstance(entry, GhostRewrite) else PrunedConvFit(entry, *args)
                )
            for state in timer.time_items("forward", states):
                with timer("moments"):
                    layer_fits[name].accumulate(node, state)
            layer_fit = layer_fits[name]
            self.weights[name] = (
                layer_fit.fit(timer, partial(self.fit_data_free, layer_fit.entry))
                if isinstance(layer_fit, GhostFit)
                else layer_fit.fit(timer)
            )
            insert_fitted(lockstep.converted, entry, self.weights[name])
            if node.name == entry.conv.calls[-1].node:
                del layer_fits[name]

    def _fit_unreached(self, path: str) -> None:
        """Fit a subgraph that no calibration image reaches without images, with a warning."""
        warn_user(f"{path}: no calibration image reaches it. It is fitted without images.")
        self.weights |= {e.conv.name: self.fit_data_free(e) for e in self.plan.rewrites if e.conv.subgraph_path == path}

    def _changed_nodes(self, path: str) -> set[str]:
        """Names of the nodes of a subgraph whose modules a fit changes, or which contain a rewritten subgraph."""
        changes = [e for e in self.plan.changes if e.conv.subgraph_path == path]
        modules = {e.norm for e in changes}
        modules |= {e.conv.local_path for e in changes if e.kept_channels}
        tensors = [name for e in changes if e.kept_channels for name, _ in e.kept_channels.tensors]
        paths = {e.conv.subgraph_path for e in self.plan.changes}
        inner_paths = [p.removeprefix(f"{path}.") for p in paths if p != path]
        return {
            n.name
            for n in self.program.subgraphs[path].graph.nodes
            if (n.op == "get_attr" and n.target in tensors)
            or (
                n.op == "call_module"
                and (n.target in modules or any(_is_inside(p, n.target) for p in (*inner_paths, *tensors)))
            )
        }


def _features(entry: GhostRewrite | PruneRewrite) -> int:
    """The number of values that a filter reads."""
    conv = entry.conv if entry.kept_channels is None else conv_after_pruning(entry.conv, entry.kept_channels)
    return conv.macs_per_output


def _note_on_rows(entry: GhostRewrite | PruneRewrite) -> str:
    features = _features(entry)
    return (
        f"{entry.conv.name}: fitted to about {sampled_rows_for(features)} positions, since its filters read {features} "
        f"values (more than {MAX_MOMENT_FEATURES})"
    )


def _is_inside(path: str, target: object) -> bool:
    """Whether a path is a node's target or inside it."""
    return f"{path}.".startswith(f"{target}.")


def fit_data_free(
    conv: nn.Conv2d,
    entry: GhostRewrite,
    norm: BatchNorm | None,
    inputs: ChannelStats | None,
    method: FitMethod = DEFAULT_METHOD,
) -> GhostWeights:
    """Ghost weights from the convolution's filters and the statistics of the following BatchNorm, without images."""
    layout = entry.layout
    white_stats = data_free_statistics(conv, norm, layout.kernel_size, inputs=inputs, map_by_map=has_many_maps(layout))
    weights = channel_weights(norm, conv.out_channels)
    stats: JointStatistics | AssignedStatistics
    if isinstance(white_stats, PerMapStatistics):
        assignment = method.assign_ghosts(white_stats.pair_errors(weights), layout)
        stats = white_stats.assigned(assignment, patches.flatten_filters(conv))
    else:
        stats = white_stats
    solution = lstsq.solve_ghosts(stats, layout, torch.diag(weights), method)
    scales = error_scales(stats.var, stats.mean_square, weights)
    unbiased = to_ghost_weights(conv, entry, stats, solution, scales)
    if conv.bias is None:
        return unbiased
    bias, m = conv.bias.detach().double().cpu()[unbiased.channels], layout.intrinsic
    ghost_means = torch.einsum("jwd,jw->j", solution.kernels, bias[solution.assignment.sources])
    return replace(unbiased, primary_bias=bias[:m], cheap_bias=bias[m:] - ghost_means)


def _warn_if_overfit(weights: Mapping[str, FittedWeights], batches: CalibrationBatches) -> None:
    """Warn of layers whose error on the holdout is much larger than on the fitted images."""
    overfit = [name for name, w in weights.items() if is_overfit(w)]
    if overfit:
        warn_user(
            f"fit overfits the calibration images: in {len(overfit)} of {len(weights)} layers (first: {overfit[0]}) "
            f"the error on the holdout is more than {OVERFIT_RATIO:g} times that on the {batches.images} images. "
            "Use more images, or more varied ones."
        )


def _note_on_images(weights: Mapping[str, FittedWeights]) -> Iterator[str]:
    """What more images would bring, where errors are larger on images that are not fitted.

    Least squares with p unknowns on N rows have errors of about (1 - p / N) times the least possible one on these rows,
    and (1 + p / N) times on others.
    """
    pairs = [(w.fit_error, w.holdout_error) for w in weights.values()]
    errors = [(float(f.mean()), float(h.mean())) for f, h in pairs if f is not None and h is not None]
    fitted, holdout = (sum(column) / len(errors) for column in zip(*errors, strict=True)) if errors else (0.0, 0.0)
    if holdout > NOTED_RATIO * fitted:
        expected = holdout - (holdout - fitted) / 4
        yield (
            f"mean error of the layers: {fitted:.3f} on the fitted images, {holdout:.3f} on the holdout; "
            f"with twice the images expect about {expected:.3f}"
        )


def is_overfit(weights: FittedWeights) -> bool:
    """Whether the error on the holdout is at least `OVERFIT_MIN_ERROR` and much larger than on the fitted images."""
    if weights.holdout_error is None or weights.fit_error is None:
        return False
    fit_error, holdout_error = weights.fit_error.mean().item(), weights.holdout_error.mean().item()
    return holdout_error > OVERFIT_RATIO * fit_error and holdout_error > OVERFIT_MIN_ERROR
