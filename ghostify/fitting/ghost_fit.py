"""Fit of one ghost module during the lockstep run: samples batch by batch, then least squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
from ghostify.fitting.error_measure import ErrorMeasure, error_measure, usable_sensitivity
from ghostify.fitting.ghost_statistics import GhostStatistics, Solution
from ghostify.fitting.holdout import HoldoutSums
from ghostify.fitting.layer_samples import LayerSamples, inverse_norm_scale, rows_for
from ghostify.fitting.linear_solvers import leading_vectors
from ghostify.fitting.lockstep import BatchState, LockstepRun
from ghostify.fitting.lstsq import DEFAULT_METHOD, FitMethod, JointStatistics
from ghostify.fitting.moments import AssignedMoments, Moments, PerMapMoments
from ghostify.fitting.patches import Crop
from ghostify.fitting.row_sample import Rows
from ghostify.fitting.sensitivity import channel_weights
from ghostify.fitting.stage_timer import StageTimer
from ghostify.graph.batchnorm import batchnorm_at
from ghostify.graph.program import conv_module
from ghostify.modules.ghost import GhostWeights
from ghostify.modules.layout import Depthwise, GhostLayout, Grouped, Pointwise
from ghostify.planning.planner import GhostRewrite
from ghostify.rewriting.activation_chain import copy_activation_chain, slice_chain

MIN_CROP_ROWS = 6_000
MAX_JOINT_FEATURES = 2304
MAX_COARSE_FEATURES = 1152
OVERFIT_TOLERANCE = 1.1
AMPLE_ROWS_PER_VALUE = 20


class GhostFit:
    """Fit of one convolution. Where it is called several times, its moments are summed and each call repeats the fit.

    The filters of a layer that is called once are first refitted to the converted model's inputs. A layer with several
    calls keeps the original filters as its basis, so that the moments of all calls refer to the same maps.
    """

    def __init__(
        self,
        entry: GhostRewrite,
        lockstep: LockstepRun,
        sensitivity: Tensor | None,
        images: int,
        seed: int,
        method: FitMethod = DEFAULT_METHOD,
    ) -> None:
        self.entry, self.method = entry, method
        module = lockstep.original if entry.kept_channels is None else lockstep.converted
        self.conv = conv_module(module, entry.conv.local_path)
        norm = batchnorm_at(lockstep.original, entry.norm)
        gain = inverse_norm_scale(norm, entry.conv.outputs)
        self.samples = LayerSamples(entry, lockstep, self.conv, gain, images, seed)
        kept_out = self.samples.kept_out
        self.is_shared = len(entry.conv.calls) > 1
        self.sensitivity = usable_sensitivity(sensitivity, kept_out)
        self.norm_weights = channel_weights(norm, entry.conv.outputs)[kept_out]
        self.free_mean = self.conv.bias is not None or norm is not None
        layout = entry.layout
        self.has_many_maps = has_many_maps(layout) and layout.kernel_size > 1
        self.crop_rows = (
            MIN_CROP_ROWS
            if self.has_many_maps
            else rows_for(layout.kernel_size**2 * layout.outputs, MIN_CROP_ROWS, 0.9)
        )
        self.crops: list[tuple[Crop, Tensor]] = []
        self.activation_chain = None if entry.activation is None else copy_activation_chain(module, entry).float().cpu()

    def accumulate(self, node: fx.Node, state: BatchState) -> None:
        """Add one batch: the convolution's input in the converted model, and its output in the original."""
        sample, d = self.samples.take(node, state), self.entry.layout.kernel_size
        side = math.ceil(self.samples.positions_per_map(state, sample.target, self.crop_rows) ** 0.5)
        crop, holdout = (
            patches.random_crop(self.conv, sample.image, sample.target, side, d, sample.seed),
            sample.holdout,
        )
        self.crops.append((crop, holdout) if d > 1 else (crop[holdout], holdout[holdout]))

    def fit(self, timer: StageTimer, data_free: Callable[[], GhostWeights]) -> GhostWeights:
        """Ghost weights from all batches, or those of `data_free` if their error on the holdout is smaller."""
        moments, filters = self.samples.moments.all_reduced(), patches.flatten_filters(self.conv).T
        self.is_split = moments.is_split
        rows = moments.fitted_rows
        measure = error_measure(rows, self.sensitivity, self.norm_weights, free_mean=self.free_mean)
        if not self.is_shared:
            with timer("solving"):
                prior = self.samples.prior_filters(measure.weights, free_mean=self.free_mean, method=self.method)
                filters = self.method.refit_filters(moments, prior, measure.weights, free_mean=self.free_mean)
        bias = None if self.conv.bias is None else rows.mean_y - filters.T @ rows.mean_u
        joint = self._joint_statistics(rows, filters, bias, measure.weights, timer)
        stats: JointStatistics | AssignedStatistics = joint
        if self.has_many_maps:
            with timer("solving"):
                assignment = self.method.assign_ghosts(lstsq.pair_costs(joint, measure.weights), self.entry.layout)
            with timer("moments"):
                stats = self._assigned_statistics(assignment, filters, bias)
        with timer("solving"):
            solution = lstsq.solve_ghosts(stats, self.entry.layout, measure.metric, self.method)
            linear = to_ghost_weights(self.conv, self.entry, stats, solution, measure.scales)
        if not moments.is_split:
            return linear
        forms = (
            [linear]
            if self.activation_chain is None
            else [linear, self._fit_activated(self.activation_chain, rows, filters, measure, timer)]
        )
        is_scarce = float(rows.count) < AMPLE_ROWS_PER_VALUE * len(filters)
        return self._select_on_holdout(forms, measure, data_free, is_scarce=is_scarce)

    def _fitted_crops(self) -> Iterator[Crop]:
        """The crops of the images that are fitted."""
        return (crop[~holdout] if self.is_split else crop for crop, holdout in self.crops)

    def _joint_statistics(
        self, moments: Moments | Rows, filters: Tensor, bias: Tensor | None, weights: Tensor, timer: StageTimer
    ) -> JointStatistics:
        """Joint statistics of the refitted maps, or of their principal maps."""
        d = self.entry.layout.kernel_size
        constant = bias is not None and d > 1
        with timer("solving"):
            basis, initial_coordinates = self._basis(
                moments,
                filters,
                weights,
                (MAX_COARSE_FEATURES if self.has_many_maps else MAX_JOINT_FEATURES) // d**2 - constant,
            )
        with timer("moments"):
            basis_moments = moments.projected(basis) if d == 1 else self._neighbourhood_moments(basis, d, constant)
        if constant and bias is not None:
            initial_coordinates = torch.cat((initial_coordinates, bias[:, None]), 1)
        return lstsq.joint_statistics(basis_moments, d * d, basis, initial_coordinates, constant, self.free_mean)

    def _assigned_statistics(
        self, assignment: GhostAssignment, filters: Tensor, bias: Tensor | None
    ) -> AssignedStatistics:
        """Statistics of the assigned intrinsic maps, each with its ghosts."""
        d, intrinsic, source = self.entry.layout.kernel_size, assignment.intrinsic[:, 0], sources_of(assignment)
        basis, intrinsic_bias = filters.T[intrinsic], None if bias is None else bias[intrinsic]
        moments = AssignedMoments.zero(len(intrinsic), d * d, len(source))
        for crop in self._fitted_crops():
            maps = crop.maps(self.conv, basis)
            if intrinsic_bias is not None:
                maps = maps + intrinsic_bias.to(maps.dtype)[:, None, None] * crop.valid_mask
            moments.add(
                patches.unfold_neighbours(maps, d),
                patches.flatten_positions(crop.target)[:, assignment.channels],
                source,
            )
        return assigned_statistics(moments.all_reduced(), assignment, basis, intrinsic_bias, self.free_mean)

    def _fit_activated(
        self,
        activation_chain: nn.Sequential,
        moments: Moments | Rows,
        filters: Tensor,
        measure: ErrorMeasure,
        timer: StageTimer,
    ) -> GhostWeights:
        """The activated form: refitted filters, and ghosts fitted to the normalised and activated intrinsic maps."""
        layout, taps = self.entry.layout, self.entry.layout.kernel_size**2
        constants = float(self.free_mean) * (moments.mean_y - filters.T @ moments.mean_u)

        def activated_neighbours(crop: Crop, channels: Tensor) -> Tensor:
            maps = crop.maps(self.conv, filters.T[channels]) + constants[channels].float()[:, None, None]
            activation = slice_chain(activation_chain, channels)
            return patches.unfold_neighbours(activation(maps) * crop.valid_mask, layout.kernel_size)

        with timer("moments"):
            map_moments = PerMapMoments.zero(layout.outputs, taps)
            for crop in (crop[::2] for crop in self._fitted_crops()):
                neighbours = activated_neighbours(crop, torch.arange(layout.outputs))
                map_moments.add(neighbours, patches.flatten_positions(crop.target))
            stats = map_statistics(map_moments.all_reduced(), self.free_mean)
        with timer("solving"):
            assignment = self.method.assign_ghosts(stats.pair_errors(measure.weights), layout)
        intrinsic, source = assignment.intrinsic[:, 0], assignment.sources[:, 0]
        with timer("moments"):
            ghost_moments = AssignedMoments.zero(len(intrinsic), taps, len(source))
            for crop in self._fitted_crops():
                targets = patches.flatten_positions(crop.target)[:, assignment.ghosts]
                ghost_moments.add(activated_neighbours(crop, intrinsic), targets, source)
        with timer("solving"):
            kernels, ghost_constants, ghost_errors = fit_assigned_kernels(
                ghost_moments.all_reduced(), source, self.free_mean
            )
            intrinsic_filters = filters[:, intrinsic]
            intrinsic_errors = moments.errors_of(intrinsic_filters, intrinsic, free_mean=self.free_mean)
            errors = to_original_order(torch.cat((intrinsic_errors, ghost_errors)), assignment)
        has_bias = self.conv.bias is not None
        return GhostWeights(
            channels=assignment.channels,
            primary_weight=patches.unflatten_filters(intrinsic_filters.T, self.conv),
            primary_bias=constants[intrinsic] if has_bias else None,
            cheap_weight=kernels.reshape(len(source), *layout.kernel_shape),
            cheap_bias=ghost_constants if has_bias else None,
            norm_shift=to_original_order(torch.cat((constants[intrinsic], ghost_constants)), assignment)
            if self.entry.norm and not has_bias
            else None,
            fit_error=measure.relative(errors),
            activated=True,
        )

    def _select_on_holdout(
        self,
        forms: list[GhostWeights],
        measure: ErrorMeasure,
        data_free: Callable[[], GhostWeights],
        *,
        is_scarce: bool,
    ) -> GhostWeights:
        """The form with the smallest error on the holdout; the data-free fit if it is better.

        That is tried where the forms overfit, or are fitted to few rows (`is_scarce`).
        """

        def holdout_cost(weights: GhostWeights) -> float:
            assert weights.holdout_error is not None
            return measure.cost(weights.holdout_error)

        best = min((self._with_holdout_error(form, measure) for form in forms), key=holdout_cost)
        assert best.fit_error is not None
        is_overfit = holdout_cost(best) > OVERFIT_TOLERANCE * measure.cost(best.fit_error)
        if is_overfit or is_scarce:
            fallback = self._with_holdout_error(replace(data_free(), fit_error=None), measure)
            return min(best, fallback, key=holdout_cost)
        return best

    def _with_holdout_error(self, weights: GhostWeights, measure: ErrorMeasure) -> GhostWeights:
        """The weights with the relative error of each output channel on the holdout, where the layer is run, and the
        predicted error of the model's outputs: trace(G E), see `output_sensitivity`."""
        sums = HoldoutSums(self.conv.out_channels)
        for crop, holdout in self.crops:
            holdout_crop = crop[holdout]
            sums.add(
                patches.flatten_positions(self._run(holdout_crop, weights)).double(),
                patches.flatten_positions(holdout_crop.target).double(),
            )
        errors = sums.errors(self.sensitivity, measure)
        assert errors is not None
        return replace(weights, holdout_error=errors.relative, output_error=errors.output_error)

    def _run(self, crop: Crop, weights: GhostWeights) -> Tensor:
        """Outputs of the ghost module and the following norm's shift on a crop, in the original channel order."""
        layout, margin = self.entry.layout, self.entry.layout.kernel_size // 2
        intrinsic = crop.maps(self.conv, weights.primary_weight.permute(0, 2, 3, 1).flatten(1))
        if weights.primary_bias is not None:
            intrinsic = intrinsic + weights.primary_bias.float()[:, None, None] * crop.valid_mask
        cheap_input = intrinsic
        if weights.activated and self.activation_chain is not None:
            channels = weights.channels[: layout.intrinsic]
            shift = 0.0 if weights.norm_shift is None else weights.norm_shift.float()[channels][:, None, None]
            cheap_input = slice_chain(self.activation_chain, channels)(intrinsic + shift) * crop.valid_mask
        specs = layout.conv_specs
        kernels = weights.cheap_weight.float().split([spec.outputs for spec in specs])
        ghosts = [
            F.conv2d(cheap_input[:, s.start : s.stop], k, groups=s.groups) for s, k in zip(specs, kernels, strict=True)
        ]
        height, width = crop.target.shape[2:]
        maps = torch.cat((intrinsic[:, :, margin : margin + height, margin : margin + width], *ghosts), 1)
        if weights.cheap_bias is not None:
            maps[:, layout.intrinsic :] += weights.cheap_bias.float()[:, None, None]
        maps = maps[:, torch.argsort(weights.channels)]
        return maps if weights.norm_shift is None else maps + weights.norm_shift.float()[:, None, None]

    def _basis(self, moments: Moments | Rows, filters: Tensor, weights: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Basis filters (b x kh kw c) and the refitted maps in that basis (n x b): themselves, or principal maps."""
        n, limit = filters.shape[1], min(limit, len(filters))
        if n <= limit or self.is_shared:
            return filters.T, torch.eye(n, dtype=torch.float64)
        scale = weights.sqrt()
        scaled = filters * scale
        covariance = moments.covariance_of(scaled, free_mean=self.free_mean)
        vectors = leading_vectors(covariance, limit)
        return vectors.T @ scaled.T, vectors / scale[:, None]

    def _neighbourhood_moments(self, basis: Tensor, d: int, constant: bool) -> Moments:
        """Moments of the basis maps at the taps of the cheap kernel; with `constant`, also of a map that is 1."""
        moments = Moments.zero(d * d * (len(basis) + constant), self.conv.out_channels)
        every = 2 if self.has_many_maps else 1
        for crop in (crop[::every] for crop in self._fitted_crops()):
            maps = crop.maps(self.conv, basis)
            if constant:
                maps = torch.cat((maps, crop.valid_mask), 1)
            moments.add(patches.unfold_neighbours(maps, d).flatten(1), patches.flatten_positions(crop.target))
        return moments.all_reduced()


def has_many_maps(layout: GhostLayout) -> bool:
    """Whether a layer has too many maps for moments between all maps at all taps of the cheap kernel.

    Only for depthwise ghosts, which do not need moments between different maps.
    """
    match layout.form:
        case Depthwise(d):
            return layout.outputs * d**2 > MAX_JOINT_FEATURES
        case Grouped() | Pointwise():
            return False
        case _:
            assert_never(layout.form)


def to_ghost_weights(
    conv: nn.Conv2d, entry: GhostRewrite, stats: GhostStatistics, solution: Solution, scales: Tensor
) -> GhostWeights:
    """Filters, kernels and biases of a solution, and its errors relative to `scales` (n).

    Constants go to the following norm where the layer has no bias.
    """
    coordinates, assignment, m = solution.intrinsic, solution.assignment, entry.layout.intrinsic
    channels, residuals = assignment.channels, stats.mean_residuals(solution)
    primary_bias = cheap_bias = shift = None
    if stats.constant:
        primary_bias, cheap_bias = coordinates[:, -1], residuals[channels[m:]]
        coordinates = coordinates[:, :-1]
    elif conv.bias is not None:
        primary_bias = residuals[channels[:m]]
        ghost_means = torch.einsum("jwd,jw->j", solution.kernels, primary_bias[assignment.sources])
        cheap_bias = residuals[channels[m:]] - ghost_means
    elif entry.norm is not None:
        shift = residuals
    return GhostWeights(
        channels=channels,
        primary_weight=patches.unflatten_filters(coordinates @ stats.basis, conv),
        primary_bias=primary_bias,
        cheap_weight=solution.kernels.reshape(len(channels) - m, *entry.layout.kernel_shape),
        cheap_bias=cheap_bias,
        norm_shift=shift,
        fit_error=stats.squared_errors(solution) / scales,
    )
