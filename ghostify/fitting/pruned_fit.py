"""Fit of one pruned convolution during the lockstep run: to the original's outputs, from the kept input channels."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ghostify.fitting import patches
from ghostify.fitting.error_measure import ErrorMeasure, error_measure, usable_sensitivity
from ghostify.fitting.holdout import HoldoutErrors, HoldoutSums
from ghostify.fitting.layer_samples import LayerSamples, inverse_norm_scale
from ghostify.fitting.lockstep import BatchState, LockstepRun
from ghostify.fitting.lstsq import DEFAULT_METHOD, FitMethod
from ghostify.fitting.sensitivity import channel_weights
from ghostify.fitting.stage_timer import StageTimer
from ghostify.graph.batchnorm import batchnorm_at
from ghostify.graph.program import conv_module
from ghostify.planning.planner import PruneRewrite
from ghostify.pruning.slicing import PrunedConvWeights


class PrunedConvFit:
    """Fit of one pruned convolution, which is already inserted in the converted model."""

    def __init__(
        self,
        entry: PruneRewrite,
        lockstep: LockstepRun,
        sensitivity: Tensor | None,
        images: int,
        seed: int,
        method: FitMethod = DEFAULT_METHOD,
    ) -> None:
        self.entry, self.method = entry, method
        self.conv = conv_module(lockstep.converted, entry.conv.local_path)
        norm = batchnorm_at(lockstep.original, entry.norm)
        gain = inverse_norm_scale(norm, entry.conv.outputs)
        self.samples = LayerSamples(entry, lockstep, self.conv, gain, images, seed)
        kept_out = self.samples.kept_out
        self.norm_weights = channel_weights(norm, entry.conv.outputs)[kept_out]
        self.sensitivity = usable_sensitivity(sensitivity, kept_out)
        self.free_mean = self.conv.bias is not None or norm is not None
        self.holdout: list[tuple[Tensor, Tensor]] = []

    def accumulate(self, node: fx.Node, state: BatchState) -> None:
        """Add one batch: the convolution's input in the converted model, and its output in the original."""
        sample = self.samples.take(node, state)
        self.holdout.append((sample.u[sample.holdout_rows], sample.y[sample.holdout_rows]))

    def fit(self, timer: StageTimer) -> PrunedConvWeights:
        """Least-squares filters with a ridge towards those for the original's inputs, and their errors."""
        moments = self.samples.moments.all_reduced()
        rows = moments.fitted_rows
        measure = error_measure(rows, self.sensitivity, self.norm_weights, free_mean=self.free_mean)
        with timer("solving"):
            prior = self.samples.prior_filters(measure.weights, free_mean=self.free_mean, method=self.method)
            filters = self.method.refit_filters(moments, prior, measure.weights, free_mean=self.free_mean)
            squared_errors = rows.errors_of(filters, torch.arange(filters.shape[1]), free_mean=self.free_mean)
            constants = rows.mean_y - filters.T @ rows.mean_u
            holdout_errors = self._holdout_errors(filters, constants * self.free_mean, measure)
        has_bias = self.conv.bias is not None
        return PrunedConvWeights(
            weight=patches.unflatten_filters(filters.T, self.conv),
            bias=constants if has_bias else None,
            shift=constants if not has_bias and self.entry.norm is not None else None,
            fit_error=measure.relative(squared_errors),
            holdout_error=None if holdout_errors is None else holdout_errors.relative,
            output_error=None if holdout_errors is None else holdout_errors.output_error,
        )

    def _holdout_errors(self, filters: Tensor, constants: Tensor, measure: ErrorMeasure) -> HoldoutErrors | None:
        sums = HoldoutSums(len(constants))
        for u, y in self.holdout:
            sums.add(u.double() @ filters + constants, y.double())
        return sums.errors(self.sensitivity, measure)
