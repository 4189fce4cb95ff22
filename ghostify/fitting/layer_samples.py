"""Regression rows of one convolution, taken batch by batch from the lockstep run of both models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ghostify.errors import GhostifyError
from ghostify.fitting import patches
from ghostify.fitting.calibration import HOLDOUT_EVERY, holdout_mask
from ghostify.fitting.lockstep import BatchState, LockstepRun
from ghostify.fitting.moments import SplitMoments
from ghostify.numerics import derive_seed
from ghostify.planning.planner import GhostRewrite, PruneRewrite

MAX_ROWS = 40_000
MIN_ROWS = 14_000
MAX_PRODUCTS = 34e9


@dataclass(frozen=True, eq=False)
class Sample:
    """One batch: what the converted model feeds the convolution and what the original made of it, whole and in rows.

    `holdout` (N) and `holdout_rows` (P) say which images, and rows of patches `u` (P x c k^2) and targets `y` (P x n),
    are held out; `seed` is the batch's own.
    """

    image: Tensor
    target: Tensor
    holdout: Tensor
    holdout_rows: Tensor
    u: Tensor
    y: Tensor
    seed: int


class LayerSamples:
    """Takes samples of one convolution and adds up their moments: those of its input patches with its target outputs.

    `gain` is sigma / gamma of the following norm, by channel of the original (see `regression_target`); `conv` is the
    convolution that reads the patches, and makes the channels `kept_out` of the original's.
    """

    def __init__(
        self,
        entry: GhostRewrite | PruneRewrite,
        walk: LockstepRun,
        conv: nn.Conv2d,
        gain: Tensor,
        images: int,
        seed: int,
    ) -> None:
        self.name, self.conv, self.gain, self.images, self.seed = entry.conv.name, conv, gain, images, seed
        self.kept_out, self.residual = kept_out_of(entry), walk.node(entry.residual_operand)
        features = conv.weight[0].numel()
        self.moments, self.rows = SplitMoments.zero(features, len(self.kept_out)), rows_for(features, MIN_ROWS)

    def take(self, node: fx.Node, chunk: BatchState) -> Sample:
        """The sample of one batch, whose moments are added; raises `GhostifyError` for values that are not finite."""
        image = chunk.value(node.all_input_nodes[0]).float().cpu()
        target = target_of(node, chunk, self.residual, self.gain, self.kept_out)
        holdout = holdout_mask(torch.arange(len(target)) + chunk.batch.first, min(HOLDOUT_EVERY, self.images))
        seed = derive_seed(self.seed, chunk.batch.first)
        positions = patches.sample_positions(target.shape, self.positions_per_map(chunk, target, self.rows), seed)
        u, y = patches.extract_patches(self.conv, image, positions), patches.gather_positions(target, positions)
        check_finite((u, y), chunk, self.name)
        holdout_rows = holdout[positions[0]]
        self.moments.add(u, y, holdout_rows)
        return Sample(image, target, holdout, holdout_rows, u, y, seed)

    def positions_per_map(self, chunk: BatchState, target: Tensor, rows: int) -> int:
        """Positions of each map of a batch to look at, for near so many rows in the whole set of images."""
        return patches.positions_per_map(rows * chunk.batch.size, self.images * len(target))


def kept_out_of(entry: GhostRewrite | PruneRewrite) -> Tensor:
    """The original's output channels that a convolution keeps."""
    keeps = None if entry.kept_channels is None else entry.kept_channels.kept_out
    return torch.arange(entry.conv.outputs) if keeps is None else torch.tensor(keeps)


def target_of(node: fx.Node, chunk: BatchState, residual: fx.Node | None, gain: Tensor, kept_out: Tensor) -> Tensor:
    """The original's output of a convolution and, before a residual sum, what the other operand lacks when converted.

    The sum of both is then the original sum less the converted other operand, seen through the norm's scale: `gain`.
    Of all channels `kept_out` are left, in the other operand as well.
    """
    kept = slice(None) if len(kept_out) == chunk.original[node].shape[1] else kept_out
    output = chunk.original[node][:, kept].float().cpu()
    if residual is None or residual not in chunk.converted:
        return output
    lacks = (chunk.original[residual][:, kept] - chunk.converted[residual]).float().cpu()
    return torch.addcmul(output, lacks, gain[kept, None, None])


def check_finite(rows: Sequence[Tensor], chunk: BatchState, name: str) -> None:
    """Raises `GhostifyError` for values that are not finite, naming batch and layer."""
    if not all(own.norm().square().isfinite() for own in rows):
        raise GhostifyError(
            f"calibration batch {chunk.batch.number}: {name} sees values that are not finite or near overflow: look at "
            f"that batch, or at the model's dtype"
        )


def rows_for(features: int, least: int, share: float = 1.0) -> int:
    """Rows for moments of so many features: as many as a share of MAX_PRODUCTS allows, from `least` to MAX_ROWS."""
    return min(MAX_ROWS, max(least, int(share * MAX_PRODUCTS / features**2)))
