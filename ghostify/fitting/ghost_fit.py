"""One convolution on the walk: what it sees and should make, taken up batch by batch, then fitted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from typing_extensions import assert_never

from ghostify.fitting import lstsq, patches
from ghostify.fitting.assignment import Groups
from ghostify.fitting.depthwise_statistics import Links, in_order, link_statistics, map_statistics, served, sources_of
from ghostify.fitting.ghost_statistics import GhostStatistics, Solution
from ghostify.fitting.holdout import HoldoutSums
from ghostify.fitting.layer_samples import LayerSamples, rows_for
from ghostify.fitting.linear_solvers import leading_vectors
from ghostify.fitting.lockstep import Chunk, Walk
from ghostify.fitting.lstsq import DEFAULT_METHOD, FitMethod, Statistics
from ghostify.fitting.moments import LinkMoments, MapMoments, Moments
from ghostify.fitting.patches import View
from ghostify.fitting.sensitivity import metric_of
from ghostify.fitting.stage_timer import Clock
from ghostify.graph.batchnorm import BatchNorm, batchnorm_affine, batchnorm_at, gamma_beta
from ghostify.graph.program import as_module
from ghostify.modules.ghost import GhostWeights
from ghostify.modules.layout import Depthwise, GhostLayout, Grouped, Pointwise
from ghostify.numerics import relative_to_variance
from ghostify.planning.planner import Rewrite
from ghostify.rewriting.activation_chain import activation_line, narrowed

VIEWED = 6_000
FEATURES = 2304
COARSE = 1152
DOUBTFUL = 1.1


class Layer:
    """Moments of one convolution. Where it is called several times, they add up and each call fits anew.

    A layer that is called once first has its dense filters refitted to the converted model's inputs; a shared one
    keeps the original filters as its basis, so that the moments of all its calls speak of the same maps.
    """

    def __init__(
        self,
        entry: Rewrite,
        walk: Walk,
        felt: Tensor | None,
        images: int,
        seed: int,
        method: FitMethod = DEFAULT_METHOD,
    ) -> None:
        self.entry, self.method = entry, method
        standing = walk.original if entry.narrowing is None else walk.converted
        self.conv = as_module(standing, entry.conv.local)
        norm = batchnorm_at(walk.original, entry.norm)
        gain = inverse_scale(norm, entry.conv.outputs)
        self.samples = LayerSamples(entry, walk, self.conv, gain, images, seed)
        kept_out = self.samples.kept_out
        self.shared = len(entry.conv.calls) > 1
        self.felt = felt if felt is not None and felt.isfinite().all() and felt.any() else None
        if self.felt is not None:
            self.felt = self.felt[kept_out][:, kept_out]
            self.metric = metric_of(self.felt)
        else:
            self.metric = torch.diag(channel_weights(norm, entry.conv.outputs)[kept_out])
        self.weights = self.metric.diagonal()
        self.free_mean = self.conv.bias is not None or norm is not None
        layout = entry.layout
        self.many = has_many_maps(layout) and layout.kernel_size > 1
        self.viewed = VIEWED if self.many else rows_for(layout.kernel_size**2 * layout.outputs, VIEWED, 0.9)
        self.views: list[tuple[View, Tensor]] = []
        self.line = None if entry.activation is None else activation_line(standing, entry).float().cpu()

    def look(self, node: fx.Node, chunk: Chunk) -> None:
        """Take up one batch: what the converted model feeds the convolution, and what the original made of it."""
        sample, d = self.samples.take(node, chunk), self.entry.layout.kernel_size
        side = math.ceil(self.samples.positions_per_map(chunk, sample.target, self.viewed) ** 0.5)
        view, held = patches.view(self.conv, sample.image, sample.target, side, d, sample.seed), sample.holdout
        self.views.append((view, held) if d > 1 else (view[held], held[held]))

    def fit(self, clock: Clock, otherwise: Callable[[], GhostWeights]) -> GhostWeights:
        """Ghost weights from all that was seen, or those of `otherwise` if they do better on the held-out images."""
        first, filters = self.samples.moments.of_all_processes(), patches.filters_of(self.conv).T
        if not self.shared:
            with clock("solving"):
                filters = self.method.refit_filters(first, filters, self.weights, free_mean=self.free_mean)
        bias = None if self.conv.bias is None else first.both.mean_y - filters.T @ first.both.mean_u
        joint = self._together(first.both, filters, bias, clock)
        stats: Statistics | Links = joint
        if self.many:
            with clock("solving"):
                groups = self.method.assign_ghosts(lstsq.pair_costs(joint, self.weights), self.entry.layout)
            with clock("moments"):
                stats = self._linked(groups, filters, bias)
        with clock("solving"):
            solution = lstsq.solve(stats, self.entry.layout, self.metric, self.method)
            fitted = emit(self.conv, self.entry, stats, solution)
        if not first.held_out.count:
            return fitted
        forms = [fitted] if self.line is None else [fitted, self._activated(self.line, first.both, filters, clock)]
        return self._judged(forms, otherwise)

    def _together(self, seen: Moments, filters: Tensor, bias: Tensor | None, clock: Clock) -> Statistics:
        """Statistics of the dense predictions, or of their principal maps, all with each other."""
        d = self.entry.layout.kernel_size
        constant = bias is not None and d > 1
        with clock("solving"):
            basis, start = self._basis(seen, filters, (COARSE if self.many else FEATURES) // d**2 - constant)
        with clock("moments"):
            seen = seen.projected(basis) if d == 1 else self._around(basis, d, constant)
        if constant and bias is not None:
            start = torch.cat((start, bias[:, None]), 1)
        return lstsq.statistics(seen, d * d, basis, start, constant, self.free_mean)

    def _linked(self, groups: Groups, filters: Tensor, bias: Tensor | None) -> Links:
        """Statistics of the chosen intrinsic maps, each with its ghosts."""
        d, own, source = self.entry.layout.kernel_size, groups.intrinsic[:, 0], sources_of(groups)
        basis, mine = filters.T[own], None if bias is None else bias[own]
        moments = LinkMoments.zero(len(own), d * d, len(source))
        for view, _ in self.views:
            maps = view.maps(self.conv, basis)
            if mine is not None:
                maps = maps + mine.to(maps.dtype)[:, None, None] * view.inside
            moments.add(patches.neighbourhoods(maps, d), patches.rows(view.target)[:, groups.channels], source)
        return link_statistics(moments.of_all_processes(), groups, basis, mine, self.free_mean)

    def _activated(self, line: nn.Sequential, seen: Moments, filters: Tensor, clock: Clock) -> GhostWeights:
        """The nonlinear form: filters of the dense prediction, ghosts fitted to what norm and activation make of it."""
        layout, places = self.entry.layout, self.entry.layout.kernel_size**2
        constants = float(self.free_mean) * (seen.mean_y - filters.T @ seen.mean_u)

        def read(view: View, channels: Tensor) -> Tensor:
            maps = view.maps(self.conv, filters.T[channels]) + constants[channels].float()[:, None, None]
            through = narrowed(line, channels)
            return patches.neighbourhoods(through(maps) * view.inside, layout.kernel_size)

        with clock("moments"):
            pairs = MapMoments.zero(layout.outputs, places)
            for view in (view[::2] for view, _ in self.views):
                pairs.add(read(view, torch.arange(layout.outputs)), patches.rows(view.target))
            stats = map_statistics(pairs.of_all_processes(), self.free_mean)
        with clock("solving"):
            groups = self.method.assign_ghosts(stats.costs(self.weights), layout)
        own, source = groups.intrinsic[:, 0], groups.sources[:, 0]
        with clock("moments"):
            links = LinkMoments.zero(len(own), places, len(source))
            for view, _ in self.views:
                links.add(read(view, own), patches.rows(view.target)[:, groups.ghosts], source)
        with clock("solving"):
            kernels, lacking, error = served(links.of_all_processes(), source, self.free_mean)
            uu, uy, yy = seen.centred() if self.free_mean else seen.raw()
            mine, var = filters[:, own], yy[own].clamp_min(1e-30)
            kept = var - 2 * (mine * uy[:, own]).sum(0) + (mine * (uu @ mine)).sum(0)
        biased = self.conv.bias is not None
        return GhostWeights(
            channels=groups.channels,
            primary_weight=patches.as_kernels(mine.T, self.conv),
            primary_bias=constants[own] if biased else None,
            cheap_weight=kernels.reshape(len(source), *layout.kernel_shape),
            cheap_bias=lacking if biased else None,
            shift=in_order(torch.cat((constants[own], lacking)), groups) if self.entry.norm and not biased else None,
            error=in_order(torch.cat((kept.clamp_min(0) / var, error)), groups),
            activated=True,
        )

    def _judged(self, forms: list[GhostWeights], otherwise: Callable[[], GhostWeights]) -> GhostWeights:
        """The form with the least error on held-out images; or the data-free fit where they are in doubt."""
        fitted = min((self._tried(form) for form in forms), key=self._lost)
        assert fitted.error is not None
        if self._lost(fitted) > DOUBTFUL * float((self.weights * fitted.error).sum()):
            return min(fitted, self._tried(replace(otherwise(), error=None)), key=self._lost)
        return fitted

    def _lost(self, weights: GhostWeights) -> float:
        assert weights.held_out is not None
        return float((self.weights * weights.held_out).sum())

    def _tried(self, weights: GhostWeights) -> GhostWeights:
        """With the relative error of each output channel on the held-out images, by running the layer there, and how
        far that moves the model's outputs: trace(G E), see `output_sensitivity`."""
        sums = HoldoutSums(self.conv.out_channels)
        for view, held in self.views:
            part = view[held]
            sums.add(patches.rows(self._run(part, weights)).double(), patches.rows(part.target).double())
        errors = sums.errors(self.felt, free_mean=self.free_mean)
        assert errors is not None
        return replace(weights, held_out=errors.relative, felt=errors.output_error)

    def _run(self, view: View, weights: GhostWeights) -> Tensor:
        """What the ghost module and the shift behind it make of the view's inputs, in the original's order."""
        layout, reach = self.entry.layout, self.entry.layout.kernel_size // 2
        intrinsic = view.maps(self.conv, weights.primary_weight.permute(0, 2, 3, 1).flatten(1))
        if weights.primary_bias is not None:
            intrinsic = intrinsic + weights.primary_bias.float()[:, None, None] * view.inside
        read = intrinsic
        if weights.activated and self.line is not None:
            own = weights.channels[: layout.intrinsic]
            held = 0.0 if weights.shift is None else weights.shift.float()[own][:, None, None]
            read = narrowed(self.line, own)(intrinsic + held) * view.inside
        specs = layout.conv_specs
        kernels = weights.cheap_weight.float().split([spec.outputs for spec in specs])
        ghosts = [F.conv2d(read[:, s.start : s.stop], k, groups=s.groups) for s, k in zip(specs, kernels, strict=True)]
        height, width = view.target.shape[2:]
        maps = torch.cat((intrinsic[:, :, reach : reach + height, reach : reach + width], *ghosts), 1)
        if weights.cheap_bias is not None:
            maps[:, layout.intrinsic :] += weights.cheap_bias.float()[:, None, None]
        maps = maps[:, torch.argsort(weights.channels)]
        return maps if weights.shift is None else maps + weights.shift.float()[:, None, None]

    def _basis(self, moments: Moments, filters: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Basis filters (b x kh kw c) and the dense prediction in them (n x b): itself, or its principal maps."""
        n, limit = filters.shape[1], min(limit, len(filters))
        if n <= limit or self.shared:
            return filters.T, torch.eye(n, dtype=torch.float64)
        uu = (moments.centred() if self.free_mean else moments.raw())[0]
        scale = self.weights.sqrt()
        scaled = filters * scale
        covariance = scaled.T @ uu @ scaled
        vectors = leading_vectors(covariance, limit)
        return vectors.T @ scaled.T, vectors / scale[:, None]

    def _around(self, basis: Tensor, d: int, constant: bool) -> Moments:
        """Moments of the basis maps at the places of the cheap kernel; with `constant`, of one that is 1 as well."""
        second = Moments.zero(d * d * (len(basis) + constant), self.conv.out_channels)
        every = 2 if self.many else 1
        for view in (view[::every] for view, _ in self.views):
            maps = view.maps(self.conv, basis)
            if constant:
                maps = torch.cat((maps, view.inside), 1)
            second.add(patches.neighbourhoods(maps, d).flatten(1), patches.rows(view.target))
        return second.of_all_processes()


def has_many_maps(layout: GhostLayout) -> bool:
    """Whether the fit does without the moments between all maps at all places of the cheap kernel: where there are too
    many, and ghosts of one map each need none between different maps."""
    match layout.form:
        case Depthwise(d):
            return layout.outputs * d**2 > FEATURES
        case Grouped() | Pointwise():
            return False
        case _:
            assert_never(layout.form)


def channel_weights(norm: BatchNorm | None, outputs: int) -> Tensor:
    """How much a squared error of each output (n) counts: gamma^2 / sigma^2 where BatchNorm follows, else alike, as
    where it silences all."""
    if norm is None or norm.running_var is None:
        return torch.ones(outputs, dtype=torch.float64)
    gamma, _ = gamma_beta(norm)
    weight = 1 / (norm.running_var.double().cpu() + norm.eps) * gamma.double().cpu().square()
    return weight.clamp_min(1e-6 * weight.mean()) if weight.any() else torch.ones_like(weight)


def emit(conv: nn.Conv2d, entry: Rewrite, stats: GhostStatistics, solution: Solution) -> GhostWeights:
    """Filters, kernels and biases of a solution; a constant that no bias can hold goes to the norm behind."""
    coordinates, channels, m = solution.intrinsic, solution.groups.channels, entry.layout.intrinsic
    lacking = stats.mean_residuals(solution)
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
    return GhostWeights(
        channels=channels,
        primary_weight=patches.as_kernels(coordinates @ stats.basis, conv),
        primary_bias=primary_bias,
        cheap_weight=solution.kernels.reshape(len(channels) - m, *entry.layout.kernel_shape),
        cheap_bias=cheap_bias,
        shift=shift,
        error=relative_to_variance(stats.squared_errors(solution), stats.var),
    )


def inverse_scale(norm: BatchNorm | None, outputs: int) -> Tensor:
    """sigma / gamma of the norm behind; 0 for channels that it all but silences, 1 where there is none."""
    if norm is None or norm.running_var is None:
        return torch.ones(outputs)
    scale = batchnorm_affine(norm, norm.running_var.dtype)[0].cpu()
    audible = scale.abs() > 0.01 * scale.abs().max()
    return torch.where(audible, 1 / scale, 0).float()
