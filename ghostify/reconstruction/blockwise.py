"""Block-wise reconstruction: a bounded number of gradient steps on ghost modules towards the original's outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ghostify.errors import GhostifyError
from ghostify.fitting.calibration import HOLDOUT_EVERY, CalibrationBatches, bind_calibration
from ghostify.fitting.distributed import rank_and_world_size
from ghostify.fitting.driver import FitResult, ProgressCallback
from ghostify.graph.batchnorm import batchnorm_at
from ghostify.graph.inputs import tensor_leaves
from ghostify.graph.program import Program
from ghostify.modules.ghost import GhostModule, GhostWeights
from ghostify.modules.hooks import has_hooks
from ghostify.numerics import derive_seed, relative_to_variance
from ghostify.planning.planner import GhostRewrite, Plan
from ghostify.reconstruction.block_runner import (
    IMAGES_PER_BATCH,
    BlockRunner,
    ImageBatch,
    Values,
    eval_copy,
    split_images,
)
from ghostify.reconstruction.blocks import Block, split_into_blocks
from ghostify.reconstruction.optimizer import adam_steps, cosine_schedule
from ghostify.rewriting.apply import ghost_path, insert_ghost, rewrite_subgraph

DEFAULT_STEPS = 200
LEARNING_RATE = 1e-2
CHECK_EVERY_STEPS = 25
MIN_RELATIVE_VARIANCE = 1e-6


@dataclass(frozen=True)
class BlockResult:
    """One block: its layers, the relative error of its outputs on the holdout, and the step with the kept weights."""

    layers: tuple[str, ...]
    error_before: float
    error_after: float
    steps: int


@dataclass(frozen=True)
class Reconstruction:
    """All blocks, and the relative error of the model's outputs on the holdout."""

    blocks: tuple[BlockResult, ...]
    error_before: float
    error_after: float


def reconstruct_blocks(
    program: Program,
    plan: Plan,
    fits: FitResult,
    calibration: Iterable[Any] | CalibrationBatches,
    *,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    on_progress: ProgressCallback | None = None,
) -> tuple[FitResult, Reconstruction]:
    """Fits with improved weights, and the result of each block.

    Each block takes `steps` steps of Adam on the squared error of its outputs, with the outputs of the blocks before it
    as they are then. A block keeps the weights with the smallest error on the holdout, an eighth of the images, which
    may be those of its fit; the same holds for the whole model. Raises `GhostifyError` for fewer than eight images, in
    a group of several processes, and for pruned layers.
    """
    started, traced = time.perf_counter(), _whole_graph(program, plan)
    with torch.inference_mode(False), torch.no_grad():
        batches = list(split_images(traced, bind_calibration(traced, calibration, program.example).local_batches))
        holdout = [b for b in batches if b.holdout]
        if sum(b.size for b in batches) < HOLDOUT_EVERY or not holdout or len(holdout) == len(batches):
            raise GhostifyError(
                f"calibration: reconstruct holds out one of {HOLDOUT_EVERY} images. Pass at least {HOLDOUT_EVERY}."
            )
        module = eval_copy(traced)
        for path in program.subgraphs:
            if path:
                rewrite_subgraph(module, path, plan, fits.weights)
        entries = [e for e in plan.rewrites if not e.conv.subgraph_path]
        layers = {e.conv.name: _TrainedLayer(module, e, fits.ghost(e.conv.name)) for e in entries}
        original, converted = BlockRunner(eval_copy(traced)), BlockRunner(module)
        whole_model = split_into_blocks(traced.graph, {})[0]
        fit_outputs = [converted.run(whole_model, b.converted) for b in holdout]
        results: list[BlockResult] = []
        calls = {call.node: e.conv.name for e in entries for call in e.conv.calls}
        for block in split_into_blocks(traced.graph, calls):
            targets = [original.run(block, b.original) for b in batches]
            if block.layers:
                if on_progress:
                    on_progress(sum(len(r.layers) for r in results), len(layers), f"block of {block.layers[0]}")
                block_layers = [layers[name] for name in block.layers]
                block_seed = derive_seed(seed, len(results))
                results.append(_reconstruct_block(converted, block, block_layers, batches, targets, steps, block_seed))
            for batch, target in zip(batches, targets, strict=True):
                batch.original, batch.converted = target, converted.run(block, batch.converted)
        loss = _BlockLoss(("output",), [b.original for b in holdout])
        error_before, error_after = (
            loss.error(holdout, outputs) for outputs in (fit_outputs, [b.converted for b in holdout])
        )
    if on_progress:
        on_progress(len(layers), len(layers), "")
    fits = replace(fits, seconds={**fits.seconds, "reconstruction": time.perf_counter() - started})
    if not error_after < error_before:
        return fits, Reconstruction(
            tuple(replace(r, error_after=r.error_before, steps=0) for r in results), error_before, error_before
        )
    weights = {**fits.weights, **{name: layer.weights() for name, layer in layers.items()}}
    return replace(fits, weights=weights), Reconstruction(tuple(results), error_before, error_after)


def _whole_graph(program: Program, plan: Plan) -> fx.GraphModule:
    """The graph of the whole model; raises `GhostifyError` where its blocks cannot be trained one by one."""
    traced = program.module
    if rank_and_world_size()[1] > 1:
        raise GhostifyError(
            "reconstruct: works in a single process only. Fit in several processes, then reconstruct in one."
        )
    if not isinstance(traced, fx.GraphModule):
        raise GhostifyError(
            f"reconstruct: needs a graph of the whole model, and {type(traced).__name__} is traced in subgraphs. "
            "Leave out reconstruct."
        )
    if has_hooks(traced):
        raise GhostifyError("reconstruct: does not run the model's own hooks. Leave out reconstruct.")
    for name in plan.pruned:
        raise GhostifyError(f"{name}: reconstruct does not work with pruned layers. Leave out reconstruct or prune.")
    return traced


class _TrainedLayer:
    """A ghost module in training, and the constants by channel that are moved to the following norm afterwards.

    Learning rates are relative: for filters to their root mean square, for biases to the output size of the filters for
    inputs of size one, for constants to the norm's standard deviation.
    """

    def __init__(self, module: fx.GraphModule, entry: GhostRewrite, weights: GhostWeights) -> None:
        insert_ghost(module, entry, replace(weights, norm_shift=None))
        ghost = module.get_submodule(ghost_path(entry))
        assert isinstance(ghost, GhostModule)
        self.ghost, self.initial = ghost, weights
        self.shift = None if weights.norm_shift is None else weights.norm_shift.to(ghost.primary_conv.weight, copy=True)
        self.learning_rates: list[tuple[Tensor, float]] = []
        for conv in (ghost.primary_conv, *ghost.cheap_convs):
            size = float(conv.weight.float().square().mean().sqrt())
            self.learning_rates.append((conv.weight, LEARNING_RATE * size))
            if conv.bias is not None:
                self.learning_rates.append((conv.bias, LEARNING_RATE * size * math.sqrt(conv.weight[0].numel())))
        if self.shift is not None:
            norm = batchnorm_at(module, entry.norm)
            assert norm is not None
            assert norm.running_var is not None
            self.learning_rates.append((self.shift, LEARNING_RATE * float(norm.running_var.float().mean().sqrt())))
            ghost.register_forward_hook(lambda _, inputs, output: output + self.shift[:, None, None])  # noqa: ARG005
            if ghost.activation is not None:
                intrinsic = weights.channels[: entry.layout.intrinsic].to(self.shift.device)
                ghost.activation.register_forward_pre_hook(
                    lambda _, args: args[0] + self.shift[intrinsic][:, None, None]
                )

    def weights(self) -> GhostWeights:
        """The present weights."""
        primary, cheap = self.ghost.primary_conv, self.ghost.cheap_convs
        biases = [c.bias.detach() for c in (primary, *cheap) if c.bias is not None]
        return replace(
            self.initial,
            primary_weight=primary.weight.detach(),
            primary_bias=biases[0] if biases else None,
            cheap_weight=torch.cat([c.weight.detach() for c in cheap]),
            cheap_bias=torch.cat(biases[1:]) if biases else None,
            norm_shift=self.shift,
        )


class _BlockLoss:
    """The squared error of a block's outputs, of each relative to its variance over the images of `targets`."""

    def __init__(self, output_names: tuple[str, ...], targets: list[Values]) -> None:
        self.output_names, self.targets = output_names, targets
        self.variances = [_variance(values) for values in zip(*map(self._tensors, targets), strict=True)]

    def _tensors(self, values: Values) -> list[Tensor]:
        return [v for v in tensor_leaves([values[name] for name in self.output_names]) if v.is_floating_point()]

    def relative_error(self, outputs: Values, target: Values) -> Tensor:
        """The mean over outputs of the relative squared error, for one batch."""
        pairs = zip(self._tensors(outputs), self._tensors(target), self.variances, strict=True)
        errors = [relative_to_variance((o.float() - t.float()).square().mean(), variance) for o, t, variance in pairs]
        return torch.stack(errors).mean() if errors else torch.zeros(())

    def error(self, batches: list[ImageBatch], outputs: Iterable[Values]) -> float:
        """The mean over the images of batches in the order of `targets`."""
        errors = [self.relative_error(o, t) * b.size for b, o, t in zip(batches, outputs, self.targets, strict=True)]
        return float(torch.stack(errors).sum()) / sum(b.size for b in batches)


def _reconstruct_block(
    runner: BlockRunner,
    block: Block,
    layers: list[_TrainedLayer],
    batches: list[ImageBatch],
    targets: list[Values],
    steps: int,
    seed: int,
) -> BlockResult:
    """Train the layers of one block; the weights with the smallest error on the holdout, which is computed every
    `CHECK_EVERY_STEPS` steps, are kept."""
    pairs = list(zip(batches, targets, strict=True))
    holdout = [b for b in batches if b.holdout]
    block_loss = _BlockLoss(block.outputs, [t for b, t in pairs if b.holdout])
    learning_rates = [rate for layer in layers for rate in layer.learning_rates]
    training = [(b, t) for b, t in pairs if not b.holdout]
    order: list[int] = []
    generator = torch.Generator().manual_seed(seed)

    def training_loss() -> Tensor:
        """The loss on the next batches of a random order, about IMAGES_PER_BATCH images together."""
        total, size = torch.zeros(()), 0
        while size < IMAGES_PER_BATCH // 2:
            order.extend([] if order else torch.randperm(len(training), generator=generator).tolist())
            batch, target = training[order.pop()]
            outputs = runner.run(block, batch.converted)
            total = total + block_loss.relative_error(outputs, target).cpu() * batch.size
            size += batch.size
        return total / size

    def holdout_error() -> float:
        return block_loss.error(holdout, (runner.run(block, b.converted) for b in holdout))

    error_before = best_error = holdout_error()
    best_step, best_values = 0, [p.clone() for p, _ in learning_rates]
    for step in adam_steps(training_loss, learning_rates, cosine_schedule(steps)):
        if step % CHECK_EVERY_STEPS == 0 or step == steps:
            error = holdout_error()
            if error < best_error:
                best_error, best_step, best_values = error, step, [p.clone() for p, _ in learning_rates]
    for (parameter, _), value in zip(learning_rates, best_values, strict=True):
        parameter.copy_(value)
    return BlockResult(block.layers, error_before, best_error, best_step)


def _variance(values: tuple[Tensor, ...]) -> Tensor:
    """Variance over images, averaged over values; over all values where shapes differ or there is one image; at least
    1e-6 of the mean square."""
    has_images = len({v.shape[1:] for v in values}) == 1 and min(v.dim() for v in values) > 0
    rows = [v.double() if has_images else v.double().reshape(-1, 1) for v in values]
    if sum(len(v) for v in rows) == 1:
        rows = [v.reshape(-1, 1) for v in rows]
    mean = torch.stack([v.sum(0) for v in rows]).sum(0) / sum(len(v) for v in rows)
    count = sum(v.numel() for v in rows)
    variance, power = (float(torch.stack([(v - c).square().sum() for v in rows]).sum()) / count for c in (mean, 0))
    return torch.tensor(max(variance, MIN_RELATIVE_VARIANCE * power), device=values[0].device)
