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

from ghostify.errors import GhostifyError
from ghostify.fitting import lstsq, patches
from ghostify.fitting.bn_statistics import Channels, input_channels
from ghostify.fitting.calibration import Batches
from ghostify.fitting.data_free import statistics_of
from ghostify.fitting.depthwise_statistics import Links, MapStatistics
from ghostify.fitting.ghost_fit import Layer, channel_weights, emit, has_many_maps
from ghostify.fitting.lockstep import Walk
from ghostify.fitting.lstsq import DEFAULT_METHOD, FitMethod, Statistics
from ghostify.fitting.pruned_fit import Dense
from ghostify.fitting.sensitivity import Calibration, Sensitivity, calibrate
from ghostify.fitting.stage_timer import Clock
from ghostify.fitting.subgraph_inputs import arriving
from ghostify.graph.batchnorm import BatchNorm, batchnorm_at
from ghostify.graph.program import Program, part_of
from ghostify.modules.ghost import GhostWeights
from ghostify.planning.planner import Plan, Rewrite
from ghostify.pruning.slicing import narrowed_conv, narrowed_norm
from ghostify.rewriting.apply import Weights, put, put_narrow, rewrite_part

PARTED = 1.5
NOTABLE = 0.02

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Fits:
    """Weights by convolution name; how many images they were fitted to (0: data-free), and the seconds of each part."""

    weights: Mapping[str, Weights]
    images: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def ghost(self, name: str) -> GhostWeights:
        """The weights of a convolution that became a ghost module."""
        found = self.weights[name]
        assert isinstance(found, GhostWeights)
        return found


def fit(
    program: Program,
    plan: Plan,
    calibration: Iterable[Any] | Calibration | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    method: FitMethod = DEFAULT_METHOD,
) -> Fits:
    """Fit every rewrite of `plan`: data-free without `calibration`, else to the original's outputs on its batches.

    `calibration` yields what `trace` takes as example inputs; further elements of a tuple, such as labels, are left
    out. In a `torch.distributed` process group every process passes the whole set, works on its share, and gets the
    same weights. Raises `GhostifyError` for an empty calibration, or one with values that are not finite; warns where
    the error on images held out is much above that on the others. `method` replaces steps of the fit in ablations.
    """
    fitting = _Fitting(program, plan, seed, progress, method)
    if calibration is None:
        for name in plan.narrowed:
            raise GhostifyError(f"{name}: is to be narrow, which takes images: pass calibration")
        with fitting.clock("solving"):
            weights = {e.conv.name: fitting.data_free(e) for e in plan.rewrites}
        return Fits(weights, 0, fitting.clock.seconds)
    calibration = calibrate(program, calibration, seed)
    fitting.clock.seconds["sensitivity"] = calibration.seconds
    with torch.no_grad():
        fitting.all_parts(calibration)
    _warn_if_parted(fitting.weights, calibration.batches)
    return Fits(fitting.weights, calibration.batches.images, fitting.clock.seconds)


class _Fitting:
    """The fits of a plan as they come, and the time they take."""

    def __init__(self, program: Program, plan: Plan, seed: int, progress: Progress | None, method: FitMethod) -> None:
        self.program, self.plan, self.seed, self.method = program, plan, seed, method
        self.progress: Progress = progress or (lambda *_: None)
        self.clock = Clock()
        self.weights: dict[str, Weights] = {}
        self.fitted = [e for e in plan.changes if isinstance(e, Rewrite) or e.conv.groups == 1]
        self.known = cache(lambda path: input_channels(program.parts[path]))

    def data_free(self, entry: Rewrite) -> GhostWeights:
        """The fit of one layer without images."""
        part, conv = self.program.parts[entry.conv.part], self.program.conv(entry.conv.name)
        norm = batchnorm_at(part, entry.norm)
        inputs = self.known(entry.conv.part).get(entry.conv.calls[0].node)
        if entry.narrowing is not None:
            keeps, reads = entry.narrowing.kept_out, entry.narrowing.kept_in
            conv = narrowed_conv(conv, keeps, reads)
            norm = norm if norm is None or keeps is None else narrowed_norm(norm, keeps)
            inputs = inputs if reads is None else None
        return data_free(conv, entry, norm, inputs, self.method)

    def all_parts(self, calibration: Calibration) -> None:
        """One part after another, inner ones first; each sees what the parts before it have become."""
        rewritten = [p for p in self.program.parts if any(e.conv.part == p for e in self.plan.changes)]
        converted = self.program.module if rewritten == [""] else copy.deepcopy(self.program.module)
        for path in rewritten:
            batches: Batches | None = calibration.batches
            if path:
                with self.clock("forward"):
                    batches = arriving(self.program, converted, path, calibration.batches)
            if batches is None:
                self._unseen(path)
            else:
                self._part(path, part_of(converted, path), batches, calibration.felt)
            if path != rewritten[-1]:
                rewrite_part(converted, path, self.plan, self.weights)
        self.progress(len(self.weights), len(self.fitted), "")

    def _part(self, path: str, converted: fx.GraphModule, batches: Batches, felt: Sensitivity) -> None:
        """The layers of one part, one after another, on the way through it in both models."""
        part, clock = self.program.parts[path], self.clock
        entries = {call.node: e for e in self.fitted if e.conv.part == path for call in e.conv.calls}
        walk = Walk(part, batches.own, set(entries), self._changed(path), converted=converted)
        for change in self.plan.changes:
            if change.conv.part == path:
                put_narrow(walk.converted, change)
        layers: dict[str, Layer | Dense] = {}
        for node, coming in clock.each("forward", walk.steps()):
            entry = entries[node.name]
            name = entry.conv.name
            self.progress(len(self.weights), len(self.fitted), name)
            if name not in layers:
                seen = walk, felt.get(name), batches.images, self.seed, self.method
                layers[name] = Layer(entry, *seen) if isinstance(entry, Rewrite) else Dense(entry, *seen)
            for chunk in clock.each("forward", coming):
                with clock("moments"):
                    layers[name].look(node, chunk)
            layer = layers[name]
            self.weights[name] = (
                layer.fit(clock, partial(self.data_free, layer.entry)) if isinstance(layer, Layer) else layer.fit(clock)
            )
            put(walk.converted, entry, self.weights[name])
            if node.name == entry.conv.calls[-1].node:
                del layers[name]

    def _unseen(self, path: str) -> None:
        """A part that no calibration image reaches is fitted without images, and named."""
        warnings.warn(f"no calibration image reaches {path}: it is fitted without images", stacklevel=4)
        self.weights |= {e.conv.name: self.data_free(e) for e in self.plan.rewrites if e.conv.part == path}

    def _changed(self, path: str) -> set[str]:
        """Nodes of a part whose modules a fit changes, or hold parts that are rewritten already."""
        changes = [e for e in self.plan.changes if e.conv.part == path]
        own = {e.norm for e in changes}
        own |= {e.conv.local for e in changes if e.narrowing}
        tensors = [name for e in changes if e.narrowing for name, _ in e.narrowing.tensors]
        inner = [p.removeprefix(f"{path}.") for p in {e.conv.part for e in self.plan.changes} if p != path]
        return {
            n.name
            for n in self.program.parts[path].graph.nodes
            if (n.op == "get_attr" and n.target in tensors)
            or (n.op == "call_module" and (n.target in own or any(_lies_in(p, n.target) for p in (*inner, *tensors))))
        }


def _lies_in(path: str, target: Any) -> bool:
    """Whether a path is that of a node's target, or of something in it."""
    return f"{path}.".startswith(f"{target}.")


def data_free(
    conv: nn.Conv2d,
    entry: Rewrite,
    norm: BatchNorm | None,
    inputs: Channels | None,
    method: FitMethod = DEFAULT_METHOD,
) -> GhostWeights:
    """Ghost weights from the convolution's filters and the statistics of the BatchNorm behind it, without images."""
    layout = entry.layout
    apart = has_many_maps(layout)
    known = statistics_of(conv, norm, layout.kernel_size, inputs=inputs, map_by_map=apart)
    weights = channel_weights(norm, conv.out_channels)
    stats: Statistics | Links
    if isinstance(known, MapStatistics):
        stats = known.linked(method.assign_ghosts(known.costs(weights), layout), patches.filters_of(conv))
    else:
        stats = known
    solution = lstsq.solve(stats, layout, torch.diag(weights), method)
    emitted = emit(conv, entry, stats, solution)
    if conv.bias is None:
        return emitted
    bias, m = conv.bias.detach().double().cpu()[emitted.channels], layout.intrinsic
    seen = torch.einsum("jwd,jw->j", solution.kernels, bias[solution.groups.sources])
    return replace(emitted, primary_bias=bias[:m], cheap_bias=bias[m:] - seen)


def _warn_if_parted(weights: Mapping[str, Weights], batches: Batches) -> None:
    """Say where the fit does not carry over to images it has not seen."""
    parted = [name for name, w in weights.items() if is_parted(w)]
    if parted:
        warnings.warn(
            f"calibration is thin: on held-out images the error of {len(parted)} of {len(weights)} layers (the first: "
            f"{parted[0]}) is more than {PARTED:g} times that on the {batches.images} images: use more, or more varied",
            stacklevel=3,
        )


def is_parted(weights: Weights) -> bool:
    """Whether the error on held-out images is notable and much above that on the others."""
    if weights.held_out is None or weights.error is None:
        return False
    seen, unseen = weights.error.mean().item(), weights.held_out.mean().item()
    return unseen > PARTED * seen and unseen > NOTABLE
