"""One convolution of a link on the walk: fitted anew to the original's outputs from the maps that are left."""

from __future__ import annotations

from torch import Tensor, fx

from ghostify.fitting import patches
from ghostify.fitting.ghost_fit import channel_weights, inverse_norm_scale
from ghostify.fitting.holdout import HoldoutErrors, HoldoutSums
from ghostify.fitting.layer_samples import LayerSamples
from ghostify.fitting.lockstep import BatchState, LockstepRun
from ghostify.fitting.lstsq import DEFAULT_METHOD, FitMethod
from ghostify.fitting.stage_timer import StageTimer
from ghostify.graph.batchnorm import batchnorm_at
from ghostify.graph.program import conv_module
from ghostify.numerics import relative_to_variance
from ghostify.planning.planner import PruneRewrite
from ghostify.pruning.slicing import PrunedConvWeights


class PrunedConvFit:
    """Moments of one narrowed convolution, which stands in the converted model already."""

    def __init__(
        self,
        entry: PruneRewrite,
        walk: LockstepRun,
        sensitivity: Tensor | None,
        images: int,
        seed: int,
        method: FitMethod = DEFAULT_METHOD,
    ) -> None:
        self.entry, self.method = entry, method
        self.conv = conv_module(walk.converted, entry.conv.local_path)
        norm = batchnorm_at(walk.original, entry.norm)
        gain = inverse_norm_scale(norm, entry.conv.outputs)
        self.samples = LayerSamples(entry, walk, self.conv, gain, images, seed)
        kept_out = self.samples.kept_out
        self.weights = channel_weights(norm, entry.conv.outputs)[kept_out]
        self.sensitivity = None if sensitivity is None else sensitivity.double()[kept_out][:, kept_out]
        self.free_mean = self.conv.bias is not None or norm is not None
        self.holdout: list[tuple[Tensor, Tensor]] = []

    def accumulate(self, node: fx.Node, chunk: BatchState) -> None:
        """Take up one batch: what the converted model feeds the convolution, and what the original made of it."""
        sample = self.samples.take(node, chunk)
        self.holdout.append((sample.u[sample.holdout_rows], sample.y[sample.holdout_rows]))

    def fit(self, clock: StageTimer) -> PrunedConvWeights:
        """Filters of least squares, ridge towards those that are left of the original's, and what they lose."""
        seen, prior = self.samples.moments.all_reduced(), patches.flatten_filters(self.conv).T
        with clock("solving"):
            filters = self.method.refit_filters(seen, prior, self.weights, free_mean=self.free_mean)
            both = seen.both
            uu, uy, yy = both.centred() if self.free_mean else both.raw()
            error = (yy - 2 * (filters * uy).sum(0) + (filters * (uu @ filters)).sum(0)).clamp_min(0)
            constants = both.mean_y - filters.T @ both.mean_u
            holdout = self._holdout_errors(filters, constants * self.free_mean)
        biased = self.conv.bias is not None
        return PrunedConvWeights(
            weight=patches.unflatten_filters(filters.T, self.conv),
            bias=constants if biased else None,
            shift=constants if not biased and self.entry.norm is not None else None,
            fit_error=relative_to_variance(error, yy),
            holdout_error=None if holdout is None else holdout.relative,
            output_error=None if holdout is None else holdout.output_error,
        )

    def _holdout_errors(self, filters: Tensor, constants: Tensor) -> HoldoutErrors | None:
        sums = HoldoutSums(len(constants))
        for u, y in self.holdout:
            sums.add(u.double() @ filters + constants, y.double())
        return sums.errors(self.sensitivity, free_mean=self.free_mean)
