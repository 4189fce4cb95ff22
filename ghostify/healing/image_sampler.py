"""Random batches of calibration images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ghostify.fitting.calibration import CalibrationBatch, CalibrationBatches, holdout_mask
from ghostify.graph.inputs import CallInputs, tensor_leaves

PIECE = 8


@dataclass(frozen=True, eq=False)
class ImageSample:
    """Inputs of some images, which a forward may overwrite; `number` is that of their first calibration batch."""

    number: int
    inputs: CallInputs
    images: int

    def with_tensor(self, tensor: Tensor) -> ImageSample:
        """The sample with another value of its only tensor."""
        return replace(self, inputs=tree_map_only(Tensor, lambda _: tensor, self.inputs))


def holdout_pieces(batches: CalibrationBatches) -> list[ImageSample]:
    """The images of the holdout, few at a time; batches that cannot be split are in it whole, by their number."""
    pieces = []
    for batch in batches.local_batches:
        rows = _holdout(batch, batches).nonzero()[:, 0]
        pieces += [_piece(batch, some) for some in rows.split(PIECE) if len(some)]
    return pieces


def training_samples(batches: CalibrationBatches, size: int, seed: int) -> Iterator[ImageSample]:
    """Samples of up to `size` images outside the holdout, without end; each pass has another order.

    A sample joins pieces of a few batches whose images have one shape. None where all images are in the holdout.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        pieces = [
            (batch, rows)
            for batch in batches.local_batches
            for rows in _shuffled(~_holdout(batch, batches), generator).split(min(size, PIECE))
            if len(rows)
        ]
        if not pieces:
            return
        order = torch.randperm(len(pieces), generator=generator).tolist()
        shuffled, count = [pieces[k] for k in order], max(1, size // PIECE)
        for k in range(0, len(shuffled), count):
            yield _joined([_piece(*piece) for piece in shuffled[k : k + count]])


def _shuffled(is_chosen: Tensor, generator: torch.Generator) -> Tensor:
    rows = is_chosen.nonzero()[:, 0]
    return rows[torch.randperm(len(rows), generator=generator)]


def _holdout(batch: CalibrationBatch, batches: CalibrationBatches) -> Tensor:
    """Which images of a batch are in the holdout; of a batch that is taken whole, one value."""
    if not batch.can_be_split:
        return holdout_mask(torch.tensor([batch.number]), batches.local_batches[-1].number + 1)
    return holdout_mask(torch.arange(batch.first, batch.first + batch.size), batches.images)


def _piece(batch: CalibrationBatch, rows: Tensor) -> ImageSample:
    return ImageSample(batch.number, batch.inputs_of(rows), len(rows) if batch.can_be_split else batch.size)


def _joined(pieces: list[ImageSample]) -> ImageSample:
    """The pieces whose tensors have the shapes of the first's, as one."""
    shapes = [[v.shape[1:] for v in tensor_leaves(piece.inputs)] for piece in pieces]
    same = [piece for piece, shape in zip(pieces, shapes, strict=True) if shape == shapes[0]]
    if len(same) == 1:
        return same[0]
    values = zip(*(tensor_leaves(piece.inputs) for piece in same), strict=True)
    joined = iter([torch.cat(tensors) for tensors in values])
    inputs = tree_map_only(Tensor, lambda _: next(joined), same[0].inputs)
    return ImageSample(same[0].number, inputs, sum(piece.images for piece in same))
