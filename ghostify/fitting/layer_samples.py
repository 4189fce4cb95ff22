"""Regression rows of one convolution, taken batch by batch from the lockstep run of both models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ghostify.errors import GhostifyError
from ghostify.fitting import patches
from ghostify.fitting.calibration import holdout_mask
from ghostify.fitting.lockstep import BatchState, LockstepRun
from ghostify.fitting.lstsq import DEFAULT_METHOD, FitMethod
from ghostify.fitting.moments import SplitMoments
from ghostify.fitting.row_sample import SplitRows, needs_rows, sampled_rows_for
from ghostify.graph.batchnorm import BatchNorm, batchnorm_affine
from ghostify.graph.linear_layers import as_maps
from ghostify.numerics import derive_seed
from ghostify.planning.planner import GhostRewrite, PruneRewrite

MAX_ROWS = 40_000
MAX_ORIGINAL_FEATURES = 4608
MIN_PATCH_ROWS = 14_000
MAX_PRODUCTS = 34e9
MIN_RELATIVE_SCALE = 0.01


@dataclass(frozen=True, eq=False)
class Sample:
    """One batch: the convolution's `image` in the converted model and its `target` from the original, and rows of them.

    `u` (P x c k^2) holds patches of the image, `y` (P x n) the targets at the same positions. `holdout` (N) and
    `holdout_rows` (P) mark the images and rows of the holdout. `seed` is derived for the batch.
    """

    image: Tensor
    target: Tensor
    holdout: Tensor
    holdout_rows: Tensor
    u: Tensor
    y: Tensor
    seed: int


class LayerSamples:
    """Samples of one convolution, batch by batch, and the moments of its input patches with its target outputs, or
    fewer rows of both where the moments would be too large.

    `gain` is sigma / gamma of the following norm, by channel of the original (see `regression_target`). `conv` is the
    convolution that reads the patches; its outputs are the channels `kept_out` of the original's. Where inputs are
    pruned, `original_moments` are those of the original's inputs that are kept, with the original's outputs.
    """

    def __init__(
        self,
        entry: GhostRewrite | PruneRewrite,
        lockstep: LockstepRun,
        conv: nn.Conv2d,
        gain: Tensor,
        images: int,
        seed: int,
    ) -> None:
        self.name, self.conv, self.gain, self.images, self.seed = entry.conv.name, conv, gain, images, seed
        self.kept_out, self.residual = kept_out_of(entry), lockstep.node(entry.residual_operand)
        self.kept_in = None if entry.kept_channels is None else entry.kept_channels.kept_in
        features = conv.weight[0].numel()
        self.moments: SplitMoments | SplitRows
        if needs_rows(features):
            self.moments, self.rows = SplitRows(features, len(self.kept_out)), sampled_rows_for(features)
        else:
            self.moments, self.rows = (
                SplitMoments.zero(features, len(self.kept_out)),
                rows_for(features, MIN_PATCH_ROWS),
            )
        has_other_inputs = self.kept_in is not None and features <= MAX_ORIGINAL_FEATURES
        self.original_moments = SplitMoments.zero(features, len(self.kept_out)) if has_other_inputs else None

    def take(self, node: fx.Node, state: BatchState) -> Sample:
        """The sample of one batch; adds its moments. Raises `GhostifyError` for values that are not finite."""
        image = as_maps(state.value(node.all_input_nodes[0]).float().cpu())
        target = regression_target(node, state, self.residual, self.gain, self.kept_out)
        holdout = holdout_mask(torch.arange(len(target)) + state.batch.first, self.images)
        seed = derive_seed(self.seed, state.batch.first)
        positions = patches.sample_positions(target.shape, self.positions_per_map(state, target, self.rows), seed)
        u, y = patches.extract_patches(self.conv, image, positions), patches.gather_positions(target, positions)
        check_finite((u, y), state, self.name)
        holdout_rows = holdout[positions[0]]
        self.moments.add(u, y, holdout_rows)
        if self.original_moments is not None:
            original = as_maps(state.original[node.all_input_nodes[0]][:, self.kept_in].float().cpu())
            output = as_maps(state.original[node][:, self.kept_out].float().cpu())
            patches_of_original = patches.extract_patches(self.conv, original, positions)
            self.original_moments.add(patches_of_original, patches.gather_positions(output, positions), holdout_rows)
        return Sample(image, target, holdout, holdout_rows, u, y, seed)

    def prior_filters(self, weights: Tensor, *, free_mean: bool, method: FitMethod = DEFAULT_METHOD) -> Tensor:
        """The filters (c k^2 x n) for the original's inputs: where some are pruned, the others predict them.

        `weights` (n) are the costs of the outputs' errors.
        """
        filters = patches.flatten_filters(self.conv).T
        if self.original_moments is None:
            return filters
        return method.refit_filters(self.original_moments.all_reduced(), filters, weights, free_mean=free_mean)

    def positions_per_map(self, state: BatchState, target: Tensor, rows: int) -> int:
        """Number of positions to sample in each map of a batch, for about `rows` rows over all images."""
        return patches.positions_per_map(rows * state.batch.size, self.images * len(target))


def kept_out_of(entry: GhostRewrite | PruneRewrite) -> Tensor:
    """The output channels of the original convolution that are kept."""
    kept_out = None if entry.kept_channels is None else entry.kept_channels.kept_out
    return torch.arange(entry.conv.outputs) if kept_out is None else torch.tensor(kept_out)


def regression_target(
    node: fx.Node, state: BatchState, residual: fx.Node | None, gain: Tensor, kept_out: Tensor
) -> Tensor:
    """The output of a convolution in the original, plus `gain` times the error of the residual operand, if any.

    With it, the sum of the output and the residual operand is that of the original: `gain` (sigma / gamma) divides the
    residual operand's error by the scale of the following norm. Only the channels `kept_out` are returned.
    """
    kept = slice(None) if len(kept_out) == state.original[node].shape[1] else kept_out
    output = as_maps(state.original[node][:, kept].float().cpu())
    if residual is None or residual not in state.converted:
        return output
    residual_error = as_maps((state.original[residual][:, kept] - state.converted[residual]).float().cpu())
    return torch.addcmul(output, residual_error, gain[kept, None, None])


def inverse_norm_scale(norm: BatchNorm | None, outputs: int) -> Tensor:
    """sigma / gamma of the following norm (n); 0 for channels with a scale near 0, 1 without a norm."""
    if norm is None or norm.running_var is None:
        return torch.ones(outputs)
    scale = batchnorm_affine(norm, norm.running_var.dtype)[0].cpu()
    is_large = scale.abs() > MIN_RELATIVE_SCALE * scale.abs().max()
    return torch.where(is_large, 1 / scale, 0).float()


def check_finite(rows: Sequence[Tensor], state: BatchState, name: str) -> None:
    """Raise `GhostifyError` for values that are not finite, with the number of the batch and the name of the layer."""
    if not all(values.norm().square().isfinite() for values in rows):
        raise GhostifyError(
            f"calibration batch {state.batch.number}: {name} has values that are not finite or near overflow. Check "
            f"that batch, or use a dtype with a larger range."
        )


def rows_for(features: int, min_rows: int, share: float = 1.0) -> int:
    """Number of rows for moments of so many features: for a share of MAX_PRODUCTS products, `min_rows` to MAX_ROWS."""
    return min(MAX_ROWS, max(min_rows, int(share * MAX_PRODUCTS / features**2)))
