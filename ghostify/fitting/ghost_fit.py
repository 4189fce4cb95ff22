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
from ghostify.fitting.assignment import GhostAssignment
from ghostify.fitting.depthwise_statistics import (
    AssignedStatistics,
    assigned_statistics,
    fit_assigned_kernels,
    map_statistics,
    sources_of,
    to_original_order,
)
from ghostify.fitting.ghost_statistics import GhostStatistics, Solution
from ghostify.fitting.holdout import HoldoutSums
from ghostify.fitting.layer_samples import LayerSamples, rows_for
from ghostify.fitting.linear_solvers import leading_vectors
from ghostify.fitting.lockstep import BatchState, LockstepRun
from ghostify.fitting.lstsq import DEFAULT_METHOD, FitMethod, JointStatistics
from ghostify.fitting.moments import AssignedMoments, Moments, PerMapMoments
from ghostify.fitting.patches import Crop
from ghostify.fitting.sensitivity import error_metric
from ghostify.fitting.stage_timer import StageTimer
from ghostify.graph.batchnorm import BatchNorm, batchnorm_affine, batchnorm_at, gamma_beta
from ghostify.graph.program import conv_module
from ghostify.modules.ghost import GhostWeights
from ghostify.modules.layout import Depthwise, GhostLayout, Grouped, Pointwise
from ghostify.numerics import relative_to_variance
from ghostify.planning.planner import GhostRewrite
from ghostify.rewriting.activation_chain import copy_activation_chain, slice_chain

MIN_CROP_ROWS = 6_000
FEATURES = 2304
MAX_COARSE_FEATURES = 1152
OVERFIT_TOLERANCE = 1.1


class GhostFit:
    """Moments of one convolution. Where it is called several times, they add up and each call fits anew.

    A layer that is called once first has its dense filters refitted to the converted model's inputs; a shared one
    keeps the original filters as its basis, so that the moments of all its calls speak of the same maps.
    """

    def __init__(
        self,
        entry: GhostRewrite,
        walk: LockstepRun,
        sensitivity: Tensor | None,
        images: int,
        seed: int,
        method: FitMethod = DEFAULT_METHOD,
    ) -> None:
        self.entry, self.method = entry, method
        standing = walk.original if entry.kept_channels is None else walk.converted
        self.conv = conv_module(standing, entry.conv.local_path)
        norm = batchnorm_at(walk.original, entry.norm)
        gain = inverse_norm_scale(norm, entry.conv.outputs)
        self.samples = LayerSamples(entry, walk, self.conv, gain, images, seed)
        kept_out = self.samples.kept_out
        self.shared = len(entry.conv.calls) > 1
        self.sensitivity = (
            sensitivity if sensitivity is not None and sensitivity.isfinite().all() and sensitivity.any() else None
        )
        if self.sensitivity is not None:
            self.sensitivity = self.sensitivity[kept_out][:, kept_out]
            self.metric = error_metric(self.sensitivity)
        else:
            self.metric = torch.diag(channel_weights(norm, entry.conv.outputs)[kept_out])
        self.weights = self.metric.diagonal()
        self.free_mean = self.conv.bias is not None or norm is not None
        layout = entry.layout
        self.many = has_many_maps(layout) and layout.kernel_size > 1
        self.viewed = (
            MIN_CROP_ROWS if self.many else rows_for(layout.kernel_size**2 * layout.outputs, MIN_CROP_ROWS, 0.9)
        )
        self.crops: list[tuple[Crop, Tensor]] = []
        self.activation_chain = (
            None if entry.activation is None else copy_activation_chain(standing, entry).float().cpu()
        )

    def accumulate(self, node: fx.Node, chunk: BatchState) -> None:
        """Take up one batch: what the converted model feeds the convolution, and what the original made of it."""
        sample, d = self.samples.take(node, chunk), self.entry.layout.kernel_size
        side = math.ceil(self.samples.positions_per_map(chunk, sample.target, self.viewed) ** 0.5)
        view, held = patches.random_crop(self.conv, sample.image, sample.target, side, d, sample.seed), sample.holdout
        self.crops.append((view, held) if d > 1 else (view[held], held[held]))

    def fit(self, clock: StageTimer, data_free: Callable[[], GhostWeights]) -> GhostWeights:
        """Ghost weights from all that was seen, or those of `data_free` if they do better on the held-out images."""
        first, filters = self.samples.moments.all_reduced(), patches.flatten_filters(self.conv).T
        if not self.shared:
            with clock("solving"):
                filters = self.method.refit_filters(first, filters, self.weights, free_mean=self.free_mean)
        bias = None if self.conv.bias is None else first.both.mean_y - filters.T @ first.both.mean_u
        joint = self._joint_statistics(first.both, filters, bias, clock)
        stats: JointStatistics | AssignedStatistics = joint
        if self.many:
            with clock("solving"):
                groups = self.method.assign_ghosts(lstsq.pair_costs(joint, self.weights), self.entry.layout)
            with clock("moments"):
                stats = self._linked(groups, filters, bias)
        with clock("solving"):
            solution = lstsq.solve_ghosts(stats, self.entry.layout, self.metric, self.method)
            fitted = to_ghost_weights(self.conv, self.entry, stats, solution)
        if not first.holdout.count:
            return fitted
        forms = (
            [fitted]
            if self.activation_chain is None
            else [fitted, self._activated(self.activation_chain, first.both, filters, clock)]
        )
        return self._select_on_holdout(forms, data_free)

    def _joint_statistics(
        self, seen: Moments, filters: Tensor, bias: Tensor | None, clock: StageTimer
    ) -> JointStatistics:
        """Statistics of the dense predictions, or of their principal maps, all with each other."""
        d = self.entry.layout.kernel_size
        constant = bias is not None and d > 1
        with clock("solving"):
            basis, start = self._basis(
                seen, filters, (MAX_COARSE_FEATURES if self.many else FEATURES) // d**2 - constant
            )
        with clock("moments"):
            seen = seen.projected(basis) if d == 1 else self._around(basis, d, constant)
        if constant and bias is not None:
            start = torch.cat((start, bias[:, None]), 1)
        return lstsq.statistics(seen, d * d, basis, start, constant, self.free_mean)

    def _linked(self, groups: GhostAssignment, filters: Tensor, bias: Tensor | None) -> AssignedStatistics:
        """Statistics of the chosen intrinsic maps, each with its ghosts."""
        d, own, source = self.entry.layout.kernel_size, groups.intrinsic[:, 0], sources_of(groups)
        basis, mine = filters.T[own], None if bias is None else bias[own]
        moments = AssignedMoments.zero(len(own), d * d, len(source))
        for view, _ in self.crops:
            maps = view.maps(self.conv, basis)
            if mine is not None:
                maps = maps + mine.to(maps.dtype)[:, None, None] * view.valid_mask
            moments.add(
                patches.unfold_neighbours(maps, d), patches.flatten_positions(view.target)[:, groups.channels], source
            )
        return assigned_statistics(moments.all_reduced(), groups, basis, mine, self.free_mean)

    def _activated(
        self, activation_chain: nn.Sequential, seen: Moments, filters: Tensor, clock: StageTimer
    ) -> GhostWeights:
        """The nonlinear form: filters of the dense prediction, ghosts fitted to what norm and activation make of it."""
        layout, places = self.entry.layout, self.entry.layout.kernel_size**2
        constants = float(self.free_mean) * (seen.mean_y - filters.T @ seen.mean_u)

        def read(view: Crop, channels: Tensor) -> Tensor:
            maps = view.maps(self.conv, filters.T[channels]) + constants[channels].float()[:, None, None]
            through = slice_chain(activation_chain, channels)
            return patches.unfold_neighbours(through(maps) * view.valid_mask, layout.kernel_size)

        with clock("moments"):
            pairs = PerMapMoments.zero(layout.outputs, places)
            for view in (view[::2] for view, _ in self.crops):
                pairs.add(read(view, torch.arange(layout.outputs)), patches.flatten_positions(view.target))
            stats = map_statistics(pairs.all_reduced(), self.free_mean)
        with clock("solving"):
            groups = self.method.assign_ghosts(stats.pair_errors(self.weights), layout)
        own, source = groups.intrinsic[:, 0], groups.sources[:, 0]
        with clock("moments"):
            links = AssignedMoments.zero(len(own), places, len(source))
            for view, _ in self.crops:
                links.add(read(view, own), patches.flatten_positions(view.target)[:, groups.ghosts], source)
        with clock("solving"):
            kernels, lacking, error = fit_assigned_kernels(links.all_reduced(), source, self.free_mean)
            uu, uy, yy = seen.centred() if self.free_mean else seen.raw()
            mine, var = filters[:, own], yy[own].clamp_min(1e-30)
            kept = var - 2 * (mine * uy[:, own]).sum(0) + (mine * (uu @ mine)).sum(0)
        biased = self.conv.bias is not None
        return GhostWeights(
            channels=groups.channels,
            primary_weight=patches.unflatten_filters(mine.T, self.conv),
            primary_bias=constants[own] if biased else None,
            cheap_weight=kernels.reshape(len(source), *layout.kernel_shape),
            cheap_bias=lacking if biased else None,
            norm_shift=to_original_order(torch.cat((constants[own], lacking)), groups)
            if self.entry.norm and not biased
            else None,
            fit_error=to_original_order(torch.cat((kept.clamp_min(0) / var, error)), groups),
            activated=True,
        )

    def _select_on_holdout(self, forms: list[GhostWeights], data_free: Callable[[], GhostWeights]) -> GhostWeights:
        """The form with the least error on held-out images; or the data-free fit where they are in doubt."""
        fitted = min((self._with_holdout_error(form) for form in forms), key=self._lost)
        assert fitted.fit_error is not None
        if self._lost(fitted) > OVERFIT_TOLERANCE * float((self.weights * fitted.fit_error).sum()):
            return min(fitted, self._with_holdout_error(replace(data_free(), fit_error=None)), key=self._lost)
        return fitted

    def _lost(self, weights: GhostWeights) -> float:
        assert weights.holdout_error is not None
        return float((self.weights * weights.holdout_error).sum())

    def _with_holdout_error(self, weights: GhostWeights) -> GhostWeights:
        """With the relative error of each output channel on the held-out images, by running the layer there, and how
        far that moves the model's outputs: trace(G E), see `output_sensitivity`."""
        sums = HoldoutSums(self.conv.out_channels)
        for view, held in self.crops:
            part = view[held]
            sums.add(
                patches.flatten_positions(self._run(part, weights)).double(),
                patches.flatten_positions(part.target).double(),
            )
        errors = sums.errors(self.sensitivity, free_mean=self.free_mean)
        assert errors is not None
        return replace(weights, holdout_error=errors.relative, output_error=errors.output_error)

    def _run(self, view: Crop, weights: GhostWeights) -> Tensor:
        """What the ghost module and the shift behind it make of the view's inputs, in the original's order."""
        layout, reach = self.entry.layout, self.entry.layout.kernel_size // 2
        intrinsic = view.maps(self.conv, weights.primary_weight.permute(0, 2, 3, 1).flatten(1))
        if weights.primary_bias is not None:
            intrinsic = intrinsic + weights.primary_bias.float()[:, None, None] * view.valid_mask
        read = intrinsic
        if weights.activated and self.activation_chain is not None:
            own = weights.channels[: layout.intrinsic]
            held = 0.0 if weights.norm_shift is None else weights.norm_shift.float()[own][:, None, None]
            read = slice_chain(self.activation_chain, own)(intrinsic + held) * view.valid_mask
        specs = layout.conv_specs
        kernels = weights.cheap_weight.float().split([spec.outputs for spec in specs])
        ghosts = [F.conv2d(read[:, s.start : s.stop], k, groups=s.groups) for s, k in zip(specs, kernels, strict=True)]
        height, width = view.target.shape[2:]
        maps = torch.cat((intrinsic[:, :, reach : reach + height, reach : reach + width], *ghosts), 1)
        if weights.cheap_bias is not None:
            maps[:, layout.intrinsic :] += weights.cheap_bias.float()[:, None, None]
        maps = maps[:, torch.argsort(weights.channels)]
        return maps if weights.norm_shift is None else maps + weights.norm_shift.float()[:, None, None]

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
        for view in (view[::every] for view, _ in self.crops):
            maps = view.maps(self.conv, basis)
            if constant:
                maps = torch.cat((maps, view.valid_mask), 1)
            second.add(patches.unfold_neighbours(maps, d).flatten(1), patches.flatten_positions(view.target))
        return second.all_reduced()


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


def to_ghost_weights(conv: nn.Conv2d, entry: GhostRewrite, stats: GhostStatistics, solution: Solution) -> GhostWeights:
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
        primary_weight=patches.unflatten_filters(coordinates @ stats.basis, conv),
        primary_bias=primary_bias,
        cheap_weight=solution.kernels.reshape(len(channels) - m, *entry.layout.kernel_shape),
        cheap_bias=cheap_bias,
        norm_shift=shift,
        fit_error=relative_to_variance(stats.squared_errors(solution), stats.var),
    )


def inverse_norm_scale(norm: BatchNorm | None, outputs: int) -> Tensor:
    """sigma / gamma of the norm behind; 0 for channels that it all but silences, 1 where there is none."""
    if norm is None or norm.running_var is None:
        return torch.ones(outputs)
    scale = batchnorm_affine(norm, norm.running_var.dtype)[0].cpu()
    audible = scale.abs() > 0.01 * scale.abs().max()
    return torch.where(audible, 1 / scale, 0).float()
