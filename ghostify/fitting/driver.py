"""Weights for a plan's ghost modules: from the filters alone, or layer by layer on calibration images."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import fx, nn

from ghostify.deprecation import renamed_keywords
from ghostify.errors import GhostifyError
from ghostify.fitting import lstsq, patches
from ghostify.fitting.bn_statistics import ChannelStats, input_channel_stats
from ghostify.fitting.calibration import CalibrationBatches
from ghostify.fitting.data_free import data_free_statistics
from ghostify.fitting.depthwise_statistics import AssignedStatistics, PerMapStatistics
from ghostify.fitting.ghost_fit import GhostFit, channel_weights, has_many_maps, to_ghost_weights
from ghostify.fitting.lockstep import LockstepRun
from ghostify.fitting.lstsq import DEFAULT_METHOD, FitMethod, JointStatistics
from ghostify.fitting.pruned_fit import PrunedConvFit
from ghostify.fitting.sensitivity import Calibration, Sensitivity, prepare_calibration
from ghostify.fitting.stage_timer import StageTimer
from ghostify.fitting.subgraph_inputs import collect_subgraph_inputs
from ghostify.graph.batchnorm import BatchNorm, batchnorm_at
from ghostify.graph.program import Program, get_subgraph
from ghostify.modules.ghost import GhostWeights
from ghostify.planning.planner import GhostRewrite, Plan
from ghostify.pruning.slicing import slice_conv, slice_norm
from ghostify.rewriting.apply import FittedWeights, insert_fitted, insert_pruned, rewrite_part

OVERFIT_RATIO = 1.5
OVERFIT_MIN_ERROR = 0.02

ProgressCallback = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class FitResult:
    """Weights by convolution name; how many images they were fitted to (0: data-free), and the seconds of each part."""

    weights: Mapping[str, FittedWeights]
    images: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def ghost(self, name: str) -> GhostWeights:
        """The weights of a convolution that became a ghost module."""
        found = self.weights[name]
        assert isinstance(found, GhostWeights)
        return found


@renamed_keywords(progress="on_progress")
def fit(
    program: Program,
    plan: Plan,
    calibration: Iterable[Any] | Calibration | None = None,
    *,
    seed: int = 0,
    on_progress: ProgressCallback | None = None,
    method: FitMethod = DEFAULT_METHOD,
) -> FitResult:
    """Fit every rewrite of `plan`: data-free without `calibration`, else to the original's outputs on its batches.

    `calibration` yields what `trace` takes as example inputs; further elements of a tuple, such as labels, are left
    out. In a `torch.distributed` process group every process passes the whole set, works on its share, and gets the
    same weights. Raises `GhostifyError` for an empty calibration, or one with values that are not finite; warns where
    the error on images held out is much above that on the others. `method` replaces steps of the fit in ablations.
    """
    fitting = _FitRun(program, plan, seed, on_progress, method)
    if calibration is None:
        for name in plan.pruned:
            raise GhostifyError(f"{name}: is to be narrow, which takes images: pass calibration")
        with fitting.clock("solving"):
            weights = {e.conv.name: fitting.fit_data_free(e) for e in plan.rewrites}
        return FitResult(weights, 0, fitting.clock.seconds)
    calibration = prepare_calibration(program, calibration, seed)
    fitting.clock.seconds["sensitivity"] = calibration.seconds
    with torch.no_grad():
        fitting.fit_subgraphs(calibration)
    _warn_if_overfit(fitting.weights, calibration.batches)
    return FitResult(fitting.weights, calibration.batches.images, fitting.clock.seconds)


class _FitRun:
    """The fits of a plan as they come, and the time they take."""

    def __init__(
        self, program: Program, plan: Plan, seed: int, progress: ProgressCallback | None, method: FitMethod
    ) -> None:
        self.program, self.plan, self.seed, self.method = program, plan, seed, method
        self.progress: ProgressCallback = progress or (lambda *_: None)
        self.clock = StageTimer()
        self.weights: dict[str, FittedWeights] = {}
        self.fitted = [e for e in plan.changes if isinstance(e, GhostRewrite) or e.conv.groups == 1]
        self.known = cache(lambda path: input_channel_stats(program.subgraphs[path]))

    def fit_data_free(self, entry: GhostRewrite) -> GhostWeights:
        """The fit of one layer without images."""
        part, conv = self.program.subgraphs[entry.conv.subgraph_path], self.program.conv(entry.conv.name)
        norm = batchnorm_at(part, entry.norm)
        inputs = self.known(entry.conv.subgraph_path).get(entry.conv.calls[0].node)
        if entry.kept_channels is not None:
            keeps, reads = entry.kept_channels.kept_out, entry.kept_channels.kept_in
            conv = slice_conv(conv, keeps, reads)
            norm = norm if norm is None or keeps is None else slice_norm(norm, keeps)
            inputs = inputs if reads is None else None
        return fit_data_free(conv, entry, norm, inputs, self.method)

    def fit_subgraphs(self, calibration: Calibration) -> None:
        """One part after another, inner ones first; each sees what the parts before it have become."""
        rewritten = [p for p in self.program.subgraphs if any(e.conv.subgraph_path == p for e in self.plan.changes)]
        converted = self.program.module if rewritten == [""] else copy.deepcopy(self.program.module)
        for path in rewritten:
            batches: CalibrationBatches | None = calibration.batches
            if path:
                with self.clock("forward"):
                    batches = collect_subgraph_inputs(self.program, converted, path, calibration.batches)
            if batches is None:
                self._fit_unreached(path)
            else:
                self._fit_subgraph(path, get_subgraph(converted, path), batches, calibration.sensitivity)
            if path != rewritten[-1]:
                rewrite_part(converted, path, self.plan, self.weights)
        self.progress(len(self.weights), len(self.fitted), "")

    def _fit_subgraph(
        self, path: str, converted: fx.GraphModule, batches: CalibrationBatches, felt: Sensitivity
    ) -> None:
        """The layers of one part, one after another, on the way through it in both models."""
        part, clock = self.program.subgraphs[path], self.clock
        entries = {call.node: e for e in self.fitted if e.conv.subgraph_path == path for call in e.conv.calls}
        walk = LockstepRun(part, batches.local_batches, set(entries), self._changed(path), converted=converted)
        for change in self.plan.changes:
            if change.conv.subgraph_path == path:
                insert_pruned(walk.converted, change)
        layers: dict[str, GhostFit | PrunedConvFit] = {}
        for node, coming in clock.time_items("forward", walk.steps()):
            entry = entries[node.name]
            name = entry.conv.name
            self.progress(len(self.weights), len(self.fitted), name)
            if name not in layers:
                seen = walk, felt.get(name), batches.images, self.seed, self.method
                layers[name] = (
                    GhostFit(entry, *seen) if isinstance(entry, GhostRewrite) else PrunedConvFit(entry, *seen)
                )
            for chunk in clock.time_items("forward", coming):
                with clock("moments"):
                    layers[name].accumulate(node, chunk)
            layer = layers[name]
            self.weights[name] = (
                layer.fit(clock, partial(self.fit_data_free, layer.entry))
                if isinstance(layer, GhostFit)
                else layer.fit(clock)
            )
            insert_fitted(walk.converted, entry, self.weights[name])
            if node.name == entry.conv.calls[-1].node:
                del layers[name]

    def _fit_unreached(self, path: str) -> None:
        """A part that no calibration image reaches is fitted without images, and named."""
        warnings.warn(f"no calibration image reaches {path}: it is fitted without images", stacklevel=4)
        self.weights |= {e.conv.name: self.fit_data_free(e) for e in self.plan.rewrites if e.conv.subgraph_path == path}

    def _changed(self, path: str) -> set[str]:
        """Nodes of a part whose modules a fit changes, or hold parts that are rewritten already."""
        changes = [e for e in self.plan.changes if e.conv.subgraph_path == path]
        own = {e.norm for e in changes}
        own |= {e.conv.local_path for e in changes if e.kept_channels}
        tensors = [name for e in changes if e.kept_channels for name, _ in e.kept_channels.tensors]
        inner = [p.removeprefix(f"{path}.") for p in {e.conv.subgraph_path for e in self.plan.changes} if p != path]
        return {
            n.name
            for n in self.program.subgraphs[path].graph.nodes
            if (n.op == "get_attr" and n.target in tensors)
            or (n.op == "call_module" and (n.target in own or any(_lies_in(p, n.target) for p in (*inner, *tensors))))
        }


def _lies_in(path: str, target: Any) -> bool:
    """Whether a path is that of a node's target, or of something in it."""
    return f"{path}.".startswith(f"{target}.")


def fit_data_free(
    conv: nn.Conv2d,
    entry: GhostRewrite,
    norm: BatchNorm | None,
    inputs: ChannelStats | None,
    method: FitMethod = DEFAULT_METHOD,
) -> GhostWeights:
    """Ghost weights from the convolution's filters and the statistics of the BatchNorm behind it, without images."""
    layout = entry.layout
    apart = has_many_maps(layout)
    known = data_free_statistics(conv, norm, layout.kernel_size, inputs=inputs, map_by_map=apart)
    weights = channel_weights(norm, conv.out_channels)
    stats: JointStatistics | AssignedStatistics
    if isinstance(known, PerMapStatistics):
        stats = known.assigned(method.assign_ghosts(known.pair_errors(weights), layout), patches.flatten_filters(conv))
    else:
        stats = known
    solution = lstsq.solve_ghosts(stats, layout, torch.diag(weights), method)
    emitted = to_ghost_weights(conv, entry, stats, solution)
    if conv.bias is None:
        return emitted
    bias, m = conv.bias.detach().double().cpu()[emitted.channels], layout.intrinsic
    seen = torch.einsum("jwd,jw->j", solution.kernels, bias[solution.groups.sources])
    return replace(emitted, primary_bias=bias[:m], cheap_bias=bias[m:] - seen)


def _warn_if_overfit(weights: Mapping[str, FittedWeights], batches: CalibrationBatches) -> None:
    """Say where the fit does not carry over to images it has not seen."""
    parted = [name for name, w in weights.items() if is_overfit(w)]
    if parted:
        warnings.warn(
            f"calibration is thin: on held-out images the error of {len(parted)} of {len(weights)} layers (the first: "
            f"{parted[0]}) is more than {OVERFIT_RATIO:g} times that on the {batches.images} images: "
            "use more, or more varied",
            stacklevel=3,
        )


def is_overfit(weights: FittedWeights) -> bool:
    """Whether the error on held-out images is notable and much above that on the others."""
    if weights.holdout_error is None or weights.fit_error is None:
        return False
    seen, unseen = weights.fit_error.mean().item(), weights.holdout_error.mean().item()
    return unseen > OVERFIT_RATIO * seen and unseen > OVERFIT_MIN_ERROR
