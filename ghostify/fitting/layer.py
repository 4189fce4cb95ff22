"""One convolution on the walk: what it sees and should make, taken up batch by batch, then fitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ghostify.errors import GhostifyError
from ghostify.fitting import lstsq, sight
from ghostify.fitting.assign import Groups, choose_groups
from ghostify.fitting.batches import HELD_OUT, judges
from ghostify.fitting.clock import Clock
from ghostify.fitting.collective import summed
from ghostify.fitting.lstsq import Solution, Statistics
from ghostify.fitting.moments import LinkMoments, MapMoments, Moments, Pair
from ghostify.fitting.pairs import Links, in_order, link_statistics, map_statistics, served, sources_of
from ghostify.fitting.sensitivity import metric_of
from ghostify.fitting.sight import View
from ghostify.fitting.systems import leading_vectors
from ghostify.fitting.walk import Chunk, Walk
from ghostify.ghost import GhostWeights, Layout
from ghostify.graph.batchnorm import BatchNorm, batchnorm_affine, batchnorm_at, gamma_beta
from ghostify.planning.activation import activation_line, narrowed
from ghostify.planning.plan import Narrow, Rewrite
from ghostify.tracing.program import as_module

POSITIONS = 40_000
SUFFICE = 14_000
WORK = 34e9
VIEWED = 6_000
FEATURES = 2304
COARSE = 1152
DOUBTFUL = 1.1


class Layer:
    """Moments of one convolution. Where it is called several times, they add up and each call fits anew.

    A layer that is called once first has its dense filters refitted to the converted model's inputs; a shared one
    keeps the original filters as its basis, so that the moments of all its calls speak of the same maps.
    """

    def __init__(self, entry: Rewrite, walk: Walk, felt: Tensor | None, images: int, seed: int) -> None:
        self.entry, self.seed, self.images = entry, seed, images
        standing = walk.original if entry.narrowing is None else walk.converted
        self.conv, self.keeps = as_module(standing, entry.conv.local), kept_of(entry)
        norm = batchnorm_at(walk.original, entry.norm)
        self.shared = len(entry.conv.calls) > 1
        self.felt = felt if felt is not None and felt.isfinite().all() and felt.any() else None
        if self.felt is not None:
            self.felt = self.felt[self.keeps][:, self.keeps]
            self.metric = metric_of(self.felt)
        else:
            self.metric = torch.diag(channel_weights(norm, entry.conv.outputs)[self.keeps])
        self.weights = self.metric.diagonal()
        self.partner = walk.node(entry.partner)
        self.gain = inverse_scale(norm, entry.conv.outputs)
        self.free_mean = self.conv.bias is not None or norm is not None
        self.first = Pair.zero(self.conv.weight[0].numel(), self.conv.out_channels)
        layout = entry.layout
        self.many = has_many_maps(layout) and layout.dw_size > 1
        self.positions = rows_for(len(self.first.fitted.u), SUFFICE)
        self.viewed = VIEWED if self.many else rows_for(layout.dw_size**2 * layout.outputs, VIEWED, 0.9)
        self.views: list[tuple[View, Tensor]] = []
        self.line = None if entry.activation is None else activation_line(standing, entry).float().cpu()

    def look(self, node: fx.Node, chunk: Chunk) -> None:
        """Take up one batch: what the converted model feeds the convolution, and what the original made of it."""
        image = chunk.value(node.all_input_nodes[0]).float().cpu()
        target = target_of(node, chunk, self.partner, self.gain, self.keeps)
        held = judges(torch.arange(len(target)) + chunk.batch.first, min(HELD_OUT, self.images))
        seed, d = self.seed * 1_000_003 + chunk.batch.first, self.entry.layout.dw_size
        places = sight.choose_places(target.shape, self._share(chunk, target, self.positions), seed)
        u, y = sight.patches(self.conv, image, places), sight.values(target, places)
        refuse_strange((u, y), chunk, self.entry.conv.name)
        self.first.add(u, y, held[places[0]])
        side = math.ceil(self._share(chunk, target, self.viewed) ** 0.5)
        view = sight.view(self.conv, image, target, side, d, seed)
        self.views.append((view, held) if d > 1 else (view[held], held[held]))

    def fit(self, clock: Clock, otherwise: Callable[[], GhostWeights]) -> GhostWeights:
        """Ghost weights from all that was seen, or those of `otherwise` if they do better on the held-out images."""
        first, filters = self.first.of_all_processes(), sight.filters_of(self.conv).T
        if not self.shared:
            with clock("solving"):
                filters = lstsq.dense_prediction(first, filters, self.weights, free_mean=self.free_mean)
        bias = None if self.conv.bias is None else first.both.mean_y - filters.T @ first.both.mean_u
        stats = self._together(first.both, filters, bias, clock)
        if self.many:
            with clock("solving"):
                groups = choose_groups(lstsq.pair_costs(stats, self.weights), self.entry.layout)
            with clock("moments"):
                stats = self._linked(groups, filters, bias)
        with clock("solving"):
            fitted = emit(self.conv, self.entry, stats, lstsq.solve(stats, self.entry.layout, self.metric))
        if not first.held_out.count:
            return fitted
        forms = [fitted] if self.line is None else [fitted, self._activated(self.line, first.both, filters, clock)]
        return self._judged(forms, otherwise)

    def _together(self, seen: Moments, filters: Tensor, bias: Tensor | None, clock: Clock) -> Any:
        """Statistics of the dense predictions, or of their principal maps, all with each other."""
        d = self.entry.layout.dw_size
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
        d, own, source = self.entry.layout.dw_size, groups.intrinsic[:, 0], sources_of(groups)
        basis, mine = filters.T[own], None if bias is None else bias[own]
        moments = LinkMoments.zero(len(own), d * d, len(source))
        for view, _ in self.views:
            maps = view.maps(self.conv, basis)
            if mine is not None:
                maps = maps + mine.to(maps.dtype)[:, None, None] * view.inside
            moments.add(sight.neighbourhoods(maps, d), sight.rows(view.target)[:, groups.channels], source)
        return link_statistics(moments.of_all_processes(), groups, basis, mine, self.free_mean)

    def _activated(self, line: nn.Sequential, seen: Moments, filters: Tensor, clock: Clock) -> GhostWeights:
        """The nonlinear form: filters of the dense prediction, ghosts fitted to what norm and activation make of it."""
        layout, places = self.entry.layout, self.entry.layout.dw_size**2
        constants = float(self.free_mean) * (seen.mean_y - filters.T @ seen.mean_u)

        def read(view: View, channels: Tensor) -> Tensor:
            maps = view.maps(self.conv, filters.T[channels]) + constants[channels].float()[:, None, None]
            through = narrowed(line, channels)
            return sight.neighbourhoods(through(maps) * view.inside, layout.dw_size)

        with clock("moments"):
            pairs = MapMoments.zero(layout.outputs, places)
            for view in (view[::2] for view, _ in self.views):
                pairs.add(read(view, torch.arange(layout.outputs)), sight.rows(view.target))
            stats = map_statistics(pairs.of_all_processes(), self.free_mean)
        with clock("solving"):
            groups = choose_groups(stats.costs(self.weights), layout)
        own, source = groups.intrinsic[:, 0], groups.sources[:, 0]
        with clock("moments"):
            links = LinkMoments.zero(len(own), places, len(source))
            for view, _ in self.views:
                links.add(read(view, own), sight.rows(view.target)[:, groups.ghosts], source)
        with clock("solving"):
            kernels, lacking, error = served(links.of_all_processes(), source, self.free_mean)
            uu, uy, yy = seen.centred() if self.free_mean else seen.raw()
            mine, var = filters[:, own], yy[own].clamp_min(1e-30)
            kept = var - 2 * (mine * uy[:, own]).sum(0) + (mine * (uu @ mine)).sum(0)
        biased = self.conv.bias is not None
        return GhostWeights(
            channels=groups.channels,
            primary_weight=sight.as_kernels(mine.T, self.conv),
            primary_bias=constants[own] if biased else None,
            cheap_weight=kernels.reshape(len(source), 1, layout.dw_size, layout.dw_size),
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
        n = self.conv.out_channels
        lost = torch.zeros(n + 2, n, dtype=torch.float64)
        count = torch.zeros((), dtype=torch.float64)
        for view, held in self.views:
            part = view[held]
            y = sight.rows(part.target).double()
            apart = sight.rows(self._run(part, weights)).double() - y
            lost += torch.cat((apart.T @ apart, torch.stack((y.sum(0), y.square().sum(0)))))
            count += len(y)
        lost, count = summed(lost, count)
        products, (mean, power) = lost[:n] / count, lost[n:] / count
        spread = (power - mean.square() if self.free_mean else power).clamp_min(1e-30)
        felt = None if self.felt is None else float((self.felt * products).sum())
        return replace(weights, held_out=products.diagonal() / spread, felt=felt)

    def _run(self, view: View, weights: GhostWeights) -> Tensor:
        """What the ghost module and the shift behind it make of the view's inputs, in the original's order."""
        layout, reach = self.entry.layout, self.entry.layout.dw_size // 2
        intrinsic = view.maps(self.conv, weights.primary_weight.permute(0, 2, 3, 1).flatten(1))
        if weights.primary_bias is not None:
            intrinsic = intrinsic + weights.primary_bias.float()[:, None, None] * view.inside
        read = intrinsic
        if weights.activated and self.line is not None:
            own = weights.channels[: layout.intrinsic]
            held = 0.0 if weights.shift is None else weights.shift.float()[own][:, None, None]
            read = narrowed(self.line, own)(intrinsic + held) * view.inside
        kernels = weights.cheap_weight.float().split([b.outputs for b in layout.blocks])
        ghosts = [
            F.conv2d(read[:, b.start : b.stop], k, groups=b.groups) for b, k in zip(layout.blocks, kernels, strict=True)
        ]
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
            second.add(sight.neighbourhoods(maps, d).flatten(1), sight.rows(view.target))
        return second.of_all_processes()

    def _share(self, chunk: Chunk, target: Tensor, limit: int) -> int:
        return positions_of(chunk, target, limit, self.images)


def kept_of(entry: Rewrite | Narrow) -> Tensor:
    """The outputs of a convolution that are left."""
    keeps = None if entry.narrowing is None else entry.narrowing.kept_out
    return torch.arange(entry.conv.outputs) if keeps is None else torch.tensor(keeps)


def target_of(node: fx.Node, chunk: Chunk, partner: fx.Node | None, gain: Tensor, kept: Tensor) -> Tensor:
    """The original's output of a convolution and, before a sum, what the other summand lacks in the converted model.

    The sum of both is then the original sum less the converted other summand, seen through the norm's scale: `gain`.
    Of all channels, `kept` are left, in the other summand as well.
    """
    own = slice(None) if len(kept) == chunk.original[node].shape[1] else kept
    output = chunk.original[node][:, own].float().cpu()
    if partner is None or partner not in chunk.converted:
        return output
    lacks = (chunk.original[partner][:, own] - chunk.converted[partner]).float().cpu()
    return torch.addcmul(output, lacks, gain[own, None, None])


def positions_of(chunk: Chunk, target: Tensor, limit: int, images: int) -> int:
    """Positions of each map to look at, for near `limit` in the whole set of `images`."""
    return sight.share_of(limit * chunk.batch.size, images * len(target))


def refuse_strange(rows: Sequence[Tensor], chunk: Chunk, name: str) -> None:
    """Raises `GhostifyError` for values that are not finite, naming batch and layer."""
    if not all(own.norm().square().isfinite() for own in rows):
        raise GhostifyError(
            f"calibration batch {chunk.batch.number}: {name} sees values that are not finite or near overflow: look at "
            f"that batch, or at the model's dtype"
        )


def rows_for(features: int, least: int, share: float = 1.0) -> int:
    """Rows to take moments of so many features from: as many as a share of WORK products allow, within limits."""
    return min(POSITIONS, max(least, int(share * WORK / features**2)))


def has_many_maps(layout: Layout) -> bool:
    """Whether there are too many maps for the moments between all of them at all places of the cheap kernel."""
    return layout.width == 1 and layout.outputs * layout.dw_size**2 > FEATURES


def channel_weights(norm: BatchNorm | None, outputs: int) -> Tensor:
    """How much a squared error of each output (n) counts: gamma^2 / sigma^2 where BatchNorm follows, else alike, as
    where it silences all."""
    if norm is None or norm.running_var is None:
        return torch.ones(outputs, dtype=torch.float64)
    gamma, _ = gamma_beta(norm)
    weight = 1 / (norm.running_var.double().cpu() + norm.eps) * gamma.double().cpu().square()
    return weight.clamp_min(1e-6 * weight.mean()) if weight.any() else torch.ones_like(weight)


def emit(conv: nn.Conv2d, entry: Rewrite, stats: Statistics | Links, solution: Solution) -> GhostWeights:
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
        error=lstsq.errors(stats, solution) / stats.var.clamp_min(1e-30),
    )


def inverse_scale(norm: BatchNorm | None, outputs: int) -> Tensor:
    """sigma / gamma of the norm behind; 0 for channels that it all but silences, 1 where there is none."""
    if norm is None or norm.running_var is None:
        return torch.ones(outputs)
    scale = batchnorm_affine(norm, norm.running_var.dtype)[0].cpu()
    audible = scale.abs() > 0.01 * scale.abs().max()
    return torch.where(audible, 1 / scale, 0).float()
