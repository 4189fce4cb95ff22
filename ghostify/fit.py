"""Weights for a plan's ghost modules: from the filters alone, or layer by layer on calibration images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify import lstsq, sight
from ghostify.datafree import statistics_of
from ghostify.errors import GhostifyError
from ghostify.lstsq import GhostWeights, MapStatistics, Solution, Statistics
from ghostify.moments import MapMoments, Moments
from ghostify.plan import Plan, Rewrite
from ghostify.rewrite import put_ghost
from ghostify.sensitivity import output_sensitivity
from ghostify.trace import Program, as_module
from ghostify.walk import Chunk, Walk, chunks_of

POSITIONS = 40_000
MAP_POSITIONS = 8_000
FEATURES = 4608
JOINT_FEATURES = 1152
HELD_OUT = 8

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Fits:
    """Weights by convolution name; how many images they were fitted to (0: data-free), and the seconds it took."""

    weights: dict[str, GhostWeights]
    images: int = 0
    seconds: float = 0.0


def fit(
    program: Program,
    plan: Plan,
    calibration: Iterable[Any] | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Fits:
    """Fit every rewrite of `plan`: data-free without `calibration`, else to the original's outputs on its batches.

    `calibration` yields what `trace` takes as example inputs; further elements of a tuple, such as labels, are left
    out. Raises `GhostifyError` for an empty calibration, or one with values that are not finite.
    """
    started = time.perf_counter()
    if calibration is None:
        weights = {e.conv.name: data_free(program, e) for e in plan.rewrites}
        return Fits(weights, 0, time.perf_counter() - started)
    chunks = chunks_of(program.module, calibration)
    weights, entries = {}, {call.node: e for e in plan.rewrites for call in e.conv.calls}
    norms = {e.norm for e in plan.rewrites if e.norm is not None}
    changed = {n.name for n in program.module.graph.nodes if n.op == "call_module" and n.target in norms}
    walk = Walk(program.module, chunks, changed | set(entries))
    felt = output_sensitivity(program, chunks, seed=seed)
    layers: dict[str, _Layer] = {}
    with torch.no_grad():
        for node in walk.steps():
            entry = entries.get(node.name)
            if entry is None:
                continue
            name = entry.conv.name
            if progress:
                progress(len(weights), len(plan.rewrites), name)
            if name not in layers:
                layers[name] = _Layer(walk, entry, felt.get(name), seed)
            weights[name] = layers[name].fit(node)
            put_ghost(walk.converted, entry, weights[name])
            if node.name == entry.conv.calls[-1].node:
                del layers[name]
    if progress:
        progress(len(weights), len(plan.rewrites), "")
    return Fits(weights, walk.images, time.perf_counter() - started)


def data_free(program: Program, entry: Rewrite) -> GhostWeights:
    """Ghost weights from the convolution's filters and the statistics of the BatchNorm behind it, without images."""
    conv, norm = program.conv(entry.conv.name), _norm(program.module, entry)
    stats = statistics_of(conv, norm, entry.layout.dw_size, map_by_map=_map_by_map(entry))
    solution = lstsq.solve(stats, entry.layout, channel_weights(norm, conv.out_channels))
    emitted = _emit(conv, entry, stats, solution)
    if conv.bias is None:
        return emitted
    bias, m = conv.bias.detach().double().cpu()[emitted.channels], entry.layout.intrinsic
    seen = torch.einsum("jwd,jw->j", solution.kernels, bias[solution.groups.sources])
    return replace(emitted, primary_bias=bias[:m], cheap_bias=bias[m:] - seen)


def channel_weights(norm: Any, outputs: int) -> Tensor:
    """How much a squared error of each output (n) counts: gamma^2 / sigma^2 where BatchNorm follows, else alike."""
    if norm is None:
        return torch.ones(outputs, dtype=torch.float64)
    weight = 1 / (norm.running_var.double().cpu() + norm.eps)
    if norm.weight is not None:
        weight = weight * norm.weight.detach().double().cpu().square()
    return weight.clamp_min(1e-6 * weight.mean())


class _Layer:
    """One convolution on the walk. Where it is called several times, moments add up and each call fits anew.

    A layer that is called once first has its dense filters refitted to the converted model's inputs; a shared one
    keeps the original filters as its basis, so that the moments of all its calls speak of the same maps.
    """

    def __init__(self, walk: Walk, entry: Rewrite, felt: Tensor | None, seed: int) -> None:
        self.walk, self.entry, self.seed = walk, entry, seed
        self.conv = as_module(walk.original, entry.conv.name)
        self.norm = _norm(walk.original, entry)
        self.shared = len(entry.conv.calls) > 1
        self.weights = channel_weights(self.norm, self.conv.out_channels)
        if felt is not None and felt.isfinite().all() and felt.any():
            self.weights = felt.clamp_min(1e-3 * felt.mean())
        self.partner = walk.node(entry.partner)
        self.gain = _inverse_scale(self.norm, self.conv.out_channels)
        self.free_mean = self.conv.bias is not None or self.norm is not None
        self.first = self._split(Moments.zero, self.conv.weight[0].numel(), self.conv.out_channels)
        self.second: Any = None

    def fit(self, node: fx.Node) -> GhostWeights:
        """Ghost weights from this call of the convolution, and from its earlier ones."""
        for chunk, image, target in self._looks(node):
            places, held = self._places(chunk, target, POSITIONS)
            u, y = sight.patches(self.conv, image, places), sight.values(target, places)
            self._refuse_strange(u, y, chunk)
            _add(self.first, u, y, held)
        prior = sight.filters_of(self.conv).T
        if self.shared:
            filters = prior
        else:
            filters, _ = lstsq.dense_prediction(
                self.first[0], self.first[1], prior, self.weights, free_mean=self.free_mean
            )
        stats, judge = self._statistics(node, filters)
        solution = lstsq.solve(stats, self.entry.layout, self.weights)
        fitted = _emit(self.conv, self.entry, stats, solution)
        if judge is None:
            return fitted
        return replace(fitted, held_out=_relative(judge, solution))

    def _statistics(self, node: fx.Node, filters: Tensor) -> tuple[Any, Any]:
        """Moments at the places of the cheap kernel: from the patches' own for d = 1, else by a second look."""
        d, everything = self.entry.layout.dw_size, self.first[0] + self.first[1]
        bias = None
        if self.conv.bias is not None:
            bias = everything.mean_y - filters.T @ everything.mean_u
        if _map_by_map(self.entry):
            self._look_map_by_map(node, filters, bias, d)
            return self._both(lambda m: lstsq.map_statistics(m, filters.T, bias, self.free_mean))
        constant = bias is not None and d > 1
        basis, start = self._basis(everything, filters, FEATURES // d**2 - constant)
        if d == 1:
            self.second = [_projected(m, basis) for m in self.first]
        else:
            self._look_all_together(node, basis, d, constant)
        if constant and bias is not None:
            start = torch.cat((start, bias[:, None]), 1)
        return self._both(lambda m: lstsq.statistics(m, d * d, basis, start, constant, self.free_mean))

    def _both(self, make: Callable[[Any], Any]) -> tuple[Any, Any]:
        return make(self.second[0] + self.second[1]), make(self.second[1]) if self.second[1].count else None

    def _basis(self, moments: Moments, filters: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Basis filters (b x kh kw c) and the dense prediction in them (n x b): itself, or its principal maps."""
        n, limit = filters.shape[1], min(limit, len(filters))
        if n <= limit or self.shared:
            return filters.T, torch.eye(n, dtype=torch.float64)
        uu = (moments.centred() if self.free_mean else moments.raw())[0]
        scale = self.weights.sqrt()
        scaled = filters * scale
        covariance = scaled.T @ uu @ scaled
        vectors = torch.linalg.eigh((covariance + covariance.T) / 2).eigenvectors[:, -limit:]
        return vectors.T @ scaled.T, vectors / scale[:, None]

    def _look_map_by_map(self, node: fx.Node, filters: Tensor, bias: Tensor | None, d: int) -> None:
        self.second = self.second or self._split(MapMoments.zero, self.conv.out_channels, d * d)
        for chunk, image, target in self._looks(node):
            maps = sight.respond(self.conv, image, filters.T)
            if bias is not None:
                maps = maps + bias.to(maps.dtype)[:, None, None]
            places, held = self._places(chunk, target, MAP_POSITIONS)
            _add(self.second, sight.neighbourhoods(maps, places, d), sight.values(target, places), held)

    def _look_all_together(self, node: fx.Node, basis: Tensor, d: int, constant: bool) -> None:
        size = d * d * (len(basis) + constant)
        self.second = self.second or self._split(Moments.zero, size, self.conv.out_channels)
        for chunk, image, target in self._looks(node):
            maps = sight.respond(self.conv, image, basis)
            if constant:
                maps = torch.cat((maps, torch.ones_like(maps[:, :1])), 1)
            places, held = self._places(chunk, target, POSITIONS)
            _add(self.second, sight.neighbourhoods(maps, places, d).flatten(1), sight.values(target, places), held)

    def _looks(self, node: fx.Node) -> Iterator[tuple[Chunk, Tensor, Tensor]]:
        """Chunk by chunk, what the converted model feeds the convolution and what the original made of it."""
        source = node.all_input_nodes[0]
        for chunk in self.walk.chunks:
            target = chunk.original[node].float().cpu()
            yield chunk, chunk.value(source).float().cpu(), target + self._made_good(chunk)

    def _made_good(self, chunk: Chunk) -> Tensor | float:
        """What the other summand lacks in the converted model, as this convolution's output would have to give it.

        The target is the original sum less the converted other summand, seen through the norm's scale.
        """
        if self.partner is None or self.partner not in chunk.converted:
            return 0.0
        lacks = (chunk.original[self.partner] - chunk.converted[self.partner]).float().cpu()
        return lacks * self.gain[:, None, None]

    def _places(self, chunk: Chunk, target: Tensor, limit: int) -> tuple[sight.Places, Tensor]:
        """Positions to look at, near `limit` in the whole set, and which belong to images that only judge."""
        share = max(1, -(-limit * chunk.size // (self.walk.images * len(target))))
        places = sight.choose_places(target.shape, share, self.seed * 1_000_003 + chunk.first)
        return places, (places[0] + chunk.first) % HELD_OUT == HELD_OUT - 1

    def _refuse_strange(self, u: Tensor, y: Tensor, chunk: Chunk) -> None:
        if not (u.isfinite().all() and y.isfinite().all()):
            raise GhostifyError(
                f"calibration batch {chunk.number}: {self.entry.conv.name} sees values that are not finite: "
                f"look at that batch, or at the model's dtype"
            )

    @staticmethod
    def _split(zero: Callable[[int, int], Any], a: int, b: int) -> list[Any]:
        """Moments for the images that are fitted to, and for those that only judge."""
        return [zero(a, b), zero(a, b)]


def _inverse_scale(norm: Any, outputs: int) -> Tensor:
    """sigma / gamma of the norm behind; 0 for channels that it all but silences, 1 where there is none."""
    if norm is None:
        return torch.ones(outputs)
    scale = (norm.running_var + norm.eps).rsqrt().cpu()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().cpu()
    audible = scale.abs() > 0.01 * scale.abs().max()
    return torch.where(audible, 1 / scale, 0).float()


def _add(pair: list[Any], u: Tensor, y: Tensor, held: Tensor) -> None:
    for moments, rows in zip(pair, (~held, held), strict=True):
        moments.add(u[rows], y[rows])


def _emit(conv: nn.Conv2d, entry: Rewrite, stats: Statistics | MapStatistics, solution: Solution) -> GhostWeights:
    """Filters, kernels and biases of a solution; a constant that no bias can hold goes to the norm behind."""
    coordinates, channels, m = solution.intrinsic, solution.groups.channels, entry.layout.intrinsic
    lacking = lstsq.constants(stats, solution)
    primary_bias = cheap_bias = shift = None
    if stats.constant:
        primary_bias, cheap_bias = coordinates[:, -1], lacking[channels[m:]]
        coordinates = coordinates[:, :-1]
    elif conv.bias is not None:
        primary_bias = lacking[channels[:m]]
        seen = torch.einsum("jwd,jw->j", solution.kernels, primary_bias[solution.groups.sources])
        cheap_bias = lacking[channels[m:]] - seen
    elif entry.norm is not None:
        shift = lacking
    d = entry.layout.dw_size
    return GhostWeights(
        channels=channels,
        primary_weight=sight.as_kernels(coordinates @ stats.basis, conv),
        primary_bias=primary_bias,
        cheap_weight=solution.kernels.reshape(len(channels) - m, -1, d, d),
        cheap_bias=cheap_bias,
        shift=shift,
        error=_relative(stats, solution),
    )


def _relative(stats: Statistics | MapStatistics, solution: Solution) -> Tensor:
    return lstsq.errors(stats, solution) / stats.var.clamp_min(1e-30)


def _map_by_map(entry: Rewrite) -> bool:
    """Whether a layer has too many maps for the moments between all of them at all places of the cheap kernel."""
    return entry.layout.width == 1 and entry.layout.outputs * entry.layout.dw_size**2 > JOINT_FEATURES


def _norm(module: fx.GraphModule, entry: Rewrite) -> Any:
    return None if entry.norm is None else module.get_submodule(entry.norm)


def _projected(moments: Moments, basis: Tensor) -> Moments:
    """Moments of the basis maps from those of the patches."""
    u, uu, uy = basis @ moments.u, basis @ moments.uu @ basis.T, basis @ moments.uy
    return Moments(moments.count, u, moments.y, uu, uy, moments.yy)
