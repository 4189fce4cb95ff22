"""Weights for a plan's ghost modules: from the filters alone, or layer by layer on calibration images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ghostify import lstsq, sight
from ghostify.assign import choose_groups
from ghostify.batches import Batches
from ghostify.clock import Clock
from ghostify.datafree import statistics_of
from ghostify.layer import Layer, channel_weights, emit, has_many_maps
from ghostify.lstsq import GhostWeights
from ghostify.plan import Plan, Rewrite
from ghostify.propagate import input_channels
from ghostify.rewrite import put_ghost
from ghostify.sensitivity import Calibration, calibrate
from ghostify.trace import Program
from ghostify.walk import Walk

PARTED = 1.5
NOTABLE = 0.02

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Fits:
    """Weights by convolution name; how many images they were fitted to (0: data-free), and the seconds of each part."""

    weights: dict[str, GhostWeights]
    images: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def fit(
    program: Program,
    plan: Plan,
    calibration: Iterable[Any] | Calibration | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Fits:
    """Fit every rewrite of `plan`: data-free without `calibration`, else to the original's outputs on its batches.

    `calibration` yields what `trace` takes as example inputs; further elements of a tuple, such as labels, are left
    out. In a `torch.distributed` process group every process passes the whole set, works on its share, and gets the
    same weights. Raises `GhostifyError` for an empty calibration, or one with values that are not finite; warns where
    the error on images held out is much above that on the others.
    """
    clock = Clock()
    if calibration is None:
        with clock("solving"):
            weights = {e.conv.name: data_free(program, e) for e in plan.rewrites}
        return Fits(weights, 0, clock.seconds)
    calibration = calibrate(program, calibration, seed)
    clock.seconds["sensitivity"] = calibration.seconds
    with torch.no_grad():
        weights = _walk(program, plan, calibration, clock, seed, progress)
    _warn_if_parted(weights, calibration.batches)
    return Fits(weights, calibration.batches.images, clock.seconds)


def _walk(
    program: Program, plan: Plan, calibration: Calibration, clock: Clock, seed: int, progress: Progress | None
) -> dict[str, GhostWeights]:
    """Fit one layer after another on the way through both models."""
    weights: dict[str, GhostWeights] = {}
    entries = {call.node: e for e in plan.rewrites for call in e.conv.calls}
    norms = {e.norm for e in plan.rewrites if e.norm is not None}
    changed = {n.name for n in program.module.graph.nodes if n.op == "call_module" and n.target in norms}
    walk = Walk(program.module, calibration.batches.own, set(entries), changed)
    layers: dict[str, Layer] = {}
    for node, arriving in clock.each("forward", walk.steps()):
        entry = entries[node.name]
        name = entry.conv.name
        if progress:
            progress(len(weights), len(plan.rewrites), name)
        if name not in layers:
            layers[name] = Layer(walk, entry, calibration.felt.get(name), calibration.batches.images, seed)
        for chunk in clock.each("forward", arriving):
            with clock("moments"):
                layers[name].look(node, chunk)
        weights[name] = layers[name].fit(clock, partial(data_free, program, entry))
        put_ghost(walk.converted, entry, weights[name])
        if node.name == entry.conv.calls[-1].node:
            del layers[name]
    if progress:
        progress(len(weights), len(plan.rewrites), "")
    return weights


def data_free(program: Program, entry: Rewrite) -> GhostWeights:
    """Ghost weights from the convolution's filters and the statistics of the BatchNorm behind it, without images."""
    conv = program.conv(entry.conv.name)
    norm: Any = None if entry.norm is None else program.module.get_submodule(entry.norm)
    layout = entry.layout
    apart = has_many_maps(layout)
    inputs = input_channels(program.module, entry.conv.calls[0].node)
    stats: Any = statistics_of(conv, norm, layout.dw_size, inputs=inputs, map_by_map=apart)
    weights = channel_weights(norm, conv.out_channels)
    if apart:
        stats = stats.linked(choose_groups(stats.costs(weights), layout), sight.filters_of(conv))
    solution = lstsq.solve(stats, layout, torch.diag(weights))
    emitted = emit(conv, entry, stats, solution)
    if conv.bias is None:
        return emitted
    bias, m = conv.bias.detach().double().cpu()[emitted.channels], layout.intrinsic
    seen = torch.einsum("jwd,jw->j", solution.kernels, bias[solution.groups.sources])
    return replace(emitted, primary_bias=bias[:m], cheap_bias=bias[m:] - seen)


def _warn_if_parted(weights: dict[str, GhostWeights], batches: Batches) -> None:
    """Say where the fit does not carry over to images it has not seen."""
    parted = [name for name, w in weights.items() if is_parted(w)]
    if parted:
        warnings.warn(
            f"calibration is thin: on held-out images the error of {len(parted)} of {len(weights)} layers (the first: "
            f"{parted[0]}) is more than {PARTED:g} times that on the {batches.images} images: use more, or more varied",
            stacklevel=3,
        )


def is_parted(weights: GhostWeights) -> bool:
    """Whether the error on held-out images is notable and much above that on the others."""
    if weights.held_out is None or weights.error is None:
        return False
    seen, unseen = weights.error.mean().item(), weights.held_out.mean().item()
    return unseen > PARTED * seen and unseen > NOTABLE
