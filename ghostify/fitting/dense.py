"""One convolution of a link on the walk: fitted anew to the original's outputs from the maps that are left."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ghostify.fitting import lstsq, sight
from ghostify.fitting.batches import HELD_OUT, judges
from ghostify.fitting.clock import Clock
from ghostify.fitting.collective import summed
from ghostify.fitting.layer import (
    SUFFICE,
    channel_weights,
    inverse_scale,
    kept_of,
    positions_of,
    refuse_strange,
    rows_for,
    target_of,
)
from ghostify.fitting.moments import Pair
from ghostify.fitting.walk import Chunk, Walk
from ghostify.graph.batchnorm import batchnorm_at
from ghostify.narrow import DenseWeights
from ghostify.planning.plan import Narrow
from ghostify.tracing.program import as_module


class Dense:
    """Moments of one narrowed convolution, which stands in the converted model already."""

    def __init__(self, entry: Narrow, walk: Walk, felt: Tensor | None, images: int, seed: int) -> None:
        self.entry, self.images, self.seed = entry, images, seed
        self.conv = as_module(walk.converted, entry.conv.local)
        whole, self.keeps = entry.conv.outputs, kept_of(entry)
        norm = batchnorm_at(walk.original, entry.norm)
        self.weights = channel_weights(norm, whole)[self.keeps]
        self.felt = None if felt is None else felt.double()[self.keeps][:, self.keeps]
        self.partner, self.gain = walk.node(entry.partner), inverse_scale(norm, whole)
        self.free_mean = self.conv.bias is not None or norm is not None
        self.seen = Pair.zero(self.conv.weight[0].numel(), len(self.keeps))
        self.positions = rows_for(self.conv.weight[0].numel(), SUFFICE)
        self.judging: list[tuple[Tensor, Tensor]] = []

    def look(self, node: fx.Node, chunk: Chunk) -> None:
        """Take up one batch: what the converted model feeds the convolution, and what the original made of it."""
        image = chunk.value(node.all_input_nodes[0]).float().cpu()
        target = target_of(node, chunk, self.partner, self.gain, self.keeps)
        held = judges(torch.arange(len(target)) + chunk.batch.first, min(HELD_OUT, self.images))
        seed = self.seed * 1_000_003 + chunk.batch.first
        places = sight.choose_places(target.shape, positions_of(chunk, target, self.positions, self.images), seed)
        u, y = sight.patches(self.conv, image, places), sight.values(target, places)
        refuse_strange((u, y), chunk, self.entry.conv.name)
        self.seen.add(u, y, held[places[0]])
        self.judging.append((u[held[places[0]]], y[held[places[0]]]))

    def fit(self, clock: Clock) -> DenseWeights:
        """Filters of least squares, ridge towards those that are left of the original's, and what they lose."""
        seen, prior = self.seen.of_all_processes(), sight.filters_of(self.conv).T
        with clock("solving"):
            filters = lstsq.dense_prediction(seen, prior, self.weights, free_mean=self.free_mean)
            both = seen.both
            uu, uy, yy = both.centred() if self.free_mean else both.raw()
            error = (yy - 2 * (filters * uy).sum(0) + (filters * (uu @ filters)).sum(0)).clamp_min(0)
            constants = both.mean_y - filters.T @ both.mean_u
            held_out, felt = self._judged(filters, constants * self.free_mean)
        biased = self.conv.bias is not None
        return DenseWeights(
            weight=sight.as_kernels(filters.T, self.conv),
            bias=constants if biased else None,
            shift=constants if not biased and self.entry.norm is not None else None,
            error=error / yy.clamp_min(1e-30),
            held_out=held_out,
            felt=felt,
        )

    def _judged(self, filters: Tensor, constants: Tensor) -> tuple[Tensor | None, float | None]:
        """Relative error of each output on held-out images, and what the model's outputs feel of it; None without."""
        n = len(self.keeps)
        lost, count = torch.zeros(n + 2, n, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for u, y in self.judging:
            apart = u.double() @ filters + constants - y
            lost += torch.cat((apart.T @ apart, torch.stack((y.double().sum(0), y.double().square().sum(0)))))
            count += len(y)
        lost, count = summed(lost, count)
        if not count:
            return None, None
        products, mean, power = lost[:n] / count, lost[n] / count, lost[n + 1] / count
        spread = (power - mean.square() if self.free_mean else power).clamp_min(1e-30)
        return products.diagonal() / spread, None if self.felt is None else float((self.felt * products).sum())
