"""Block by block, a bounded number of gradient steps on ghost modules towards the original block's outputs."""

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
from ghostify.numerics import derive_seed, relative_to_variance
from ghostify.planning.planner import GhostRewrite, Plan
from ghostify.reconstruction.block_runner import IMAGES, BlockRunner, ImageBatch, Values, eval_copy, split_images
from ghostify.reconstruction.blocks import Block, blocks_of
from ghostify.reconstruction.optimizer import adam_steps
from ghostify.rewriting.apply import ghost_path, insert_ghost, rewrite_part

STEPS = 200
RATE = 1e-2
CHECK_EVERY = 25


@dataclass(frozen=True)
class BlockResult:
    """One block: its layers, the relative error of its outputs on held-out images, and the steps that were kept."""

    layers: tuple[str, ...]
    error_before: float
    error_after: float
    steps: int


@dataclass(frozen=True)
class Reconstruction:
    """All blocks, and the relative error of the model's outputs on held-out images."""

    blocks: tuple[BlockResult, ...]
    error_before: float
    error_after: float


def reconstruct_blocks(
    program: Program,
    plan: Plan,
    fits: FitResult,
    calibration: Iterable[Any] | CalibrationBatches,
    *,
    steps: int = STEPS,
    seed: int = 0,
    on_progress: ProgressCallback | None = None,
) -> tuple[FitResult, Reconstruction]:
    """Fits with better weights, and what became of each block.

    Every block gets `steps` steps of Adam on the squared error of its outputs, fed by the blocks before as they now
    are. A block keeps what is best on held-out images (every eighth), if only its fit, and so does the whole model.
    Raises `GhostifyError` for fewer than eight images, in a group of several processes, and for layers with fewer maps.
    """
    started, traced = time.perf_counter(), _whole_graph(program, plan)
    with torch.inference_mode(False), torch.no_grad():
        parts = list(split_images(traced, bind_calibration(traced, calibration).local_batches))
        held = [p for p in parts if p.holdout]
        if not held or len(held) == len(parts):
            raise GhostifyError(
                f"reconstruct judges by every {HOLDOUT_EVERY}th calibration image: pass at least {HOLDOUT_EVERY}"
            )
        module = eval_copy(traced)
        for path in program.subgraphs:
            if path:
                rewrite_part(module, path, plan, fits.weights)
        entries = [e for e in plan.rewrites if not e.conv.subgraph_path]
        layers = {e.conv.name: _Layer(module, e, fits.ghost(e.conv.name)) for e in entries}
        original, converted = BlockRunner(eval_copy(traced)), BlockRunner(module)
        whole = blocks_of(traced.graph, {})[0]
        first = [converted.run(whole, p.converted) for p in held]
        blocks: list[BlockResult] = []
        calls = {call.node: e.conv.name for e in entries for call in e.conv.calls}
        for block in blocks_of(traced.graph, calls):
            targets = [original.run(block, p.original) for p in parts]
            if block.layers:
                if on_progress:
                    on_progress(sum(len(b.layers) for b in blocks), len(layers), f"block of {block.layers[0]}")
                trained = [layers[name] for name in block.layers]
                drawn = derive_seed(seed, len(blocks))
                blocks.append(_reconstruct_block(converted, block, trained, parts, targets, steps, drawn))
            for part, target in zip(parts, targets, strict=True):
                part.original, part.converted = target, converted.run(block, part.converted)
        judge = _BlockLoss(("output",), [p.original for p in held])
        before, after = (judge.error(held, made) for made in (first, [p.converted for p in held]))
    if on_progress:
        on_progress(len(layers), len(layers), "")
    fits = replace(fits, seconds={**fits.seconds, "reconstruction": time.perf_counter() - started})
    if not after < before:
        return fits, Reconstruction(
            tuple(replace(b, error_after=b.error_before, steps=0) for b in blocks), before, before
        )
    weights = {**fits.weights, **{name: layer.weights() for name, layer in layers.items()}}
    return replace(fits, weights=weights), Reconstruction(tuple(blocks), before, after)


def _whole_graph(program: Program, plan: Plan) -> fx.GraphModule:
    """The program's graph, where blocks can be trained one by one."""
    traced = program.module
    if rank_and_world_size()[1] > 1:
        raise GhostifyError("reconstruct works in one process: fit in several, then reconstruct in one")
    if not isinstance(traced, fx.GraphModule):
        raise GhostifyError(f"reconstruct needs a graph of the whole model: {type(traced).__name__} traces in parts")
    for name in plan.pruned:
        raise GhostifyError(f"{name}: has fewer maps than the original's: reconstruct or narrow")
    return traced


class _Layer:
    """A ghost module under training, and the constants by channel that the norm behind takes up in the end.

    Learning rates are relative: for filters to their size, for constants to what filters make of inputs of size one,
    or to the norm's deviation.
    """

    def __init__(self, module: fx.GraphModule, entry: GhostRewrite, weights: GhostWeights) -> None:
        insert_ghost(module, entry, replace(weights, norm_shift=None))
        ghost = module.get_submodule(ghost_path(entry))
        assert isinstance(ghost, GhostModule)
        self.ghost, self.given = ghost, weights
        self.shift = None if weights.norm_shift is None else weights.norm_shift.to(ghost.primary_conv.weight, copy=True)
        self.rated: list[tuple[Tensor, float]] = []
        for conv in (ghost.primary_conv, *ghost.cheap_convs):
            size = float(conv.weight.float().square().mean().sqrt())
            self.rated.append((conv.weight, RATE * size))
            if conv.bias is not None:
                self.rated.append((conv.bias, RATE * size * math.sqrt(conv.weight[0].numel())))
        if self.shift is not None:
            norm: Any = batchnorm_at(module, entry.norm)
            self.rated.append((self.shift, RATE * float(norm.running_var.float().mean().sqrt())))
            ghost.register_forward_hook(lambda _, inputs, made: made + self.shift[:, None, None])  # noqa: ARG005
            if ghost.activation is not None:
                own = weights.channels[: entry.layout.intrinsic].to(self.shift.device)
                ghost.activation.register_forward_pre_hook(lambda _, read: read[0] + self.shift[own][:, None, None])

    def weights(self) -> GhostWeights:
        """As they now are."""
        primary, cheap = self.ghost.primary_conv, self.ghost.cheap_convs
        biases = [c.bias.detach() for c in (primary, *cheap) if c.bias is not None]
        return replace(
            self.given,
            primary_weight=primary.weight.detach(),
            primary_bias=biases[0] if biases else None,
            cheap_weight=torch.cat([c.weight.detach() for c in cheap]),
            cheap_bias=torch.cat(biases[1:]) if biases else None,
            norm_shift=self.shift,
        )


class _BlockLoss:
    """The squared error of a block's outputs, of each relative to its variance over the images of `targets`."""

    def __init__(self, outputs: tuple[str, ...], targets: list[Values]) -> None:
        self.outputs, self.targets = outputs, targets
        self.spreads = [_variance(values) for values in zip(*map(self._tensors, targets), strict=True)]

    def _tensors(self, values: Values) -> list[Tensor]:
        return [v for v in tensor_leaves([values[name] for name in self.outputs]) if v.is_floating_point()]

    def distance(self, made: Values, target: Values) -> Tensor:
        pairs = zip(self._tensors(made), self._tensors(target), self.spreads, strict=True)
        each = [relative_to_variance((m.float() - t.float()).square().mean(), spread) for m, t, spread in pairs]
        return torch.stack(each).mean() if each else torch.zeros(())

    def error(self, parts: list[ImageBatch], made: Iterable[Values]) -> float:
        """Over parts in the order of `targets`."""
        each = [self.distance(m, t) * p.size for p, m, t in zip(parts, made, self.targets, strict=True)]
        return float(torch.stack(each).sum()) / sum(p.size for p in parts)


def _reconstruct_block(
    side: BlockRunner,
    block: Block,
    layers: list[_Layer],
    parts: list[ImageBatch],
    targets: list[Values],
    steps: int,
    seed: int,
) -> BlockResult:
    """Train the layers of one block; looking every LOOK steps, they keep what is best on held-out images."""
    pairs = list(zip(parts, targets, strict=True))
    held = [p for p in parts if p.holdout]
    judge = _BlockLoss(block.outputs, [t for p, t in pairs if p.holdout])
    rated = [r for layer in layers for r in layer.rated]
    seen = [(p, t) for p, t in pairs if not p.holdout]
    order: list[int] = []
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        """Of some images: the next parts of the order, about IMAGES together."""
        total, size = torch.zeros(()), 0
        while size < IMAGES // 2:
            order.extend([] if order else torch.randperm(len(seen), generator=generator).tolist())
            part, target = seen[order.pop()]
            total = total + judge.distance(side.run(block, part.converted), target).cpu() * part.size
            size += part.size
        return total / size

    def error() -> float:
        return judge.error(held, (side.run(block, p.converted) for p in held))

    before = best = error()
    taken, kept = 0, [p.clone() for p, _ in rated]
    for step in adam_steps(loss, rated, steps):
        if step % CHECK_EVERY == 0 or step == steps:
            now = error()
            if now < best:
                best, taken, kept = now, step, [p.clone() for p, _ in rated]
    for (parameter, _), value in zip(rated, kept, strict=True):
        parameter.copy_(value)
    return BlockResult(block.layers, before, best, taken)


def _variance(values: tuple[Tensor, ...]) -> Tensor:
    """Over images, value by value; over everything where shapes differ or there is one image; at least 1e-6 of the
    mean square."""
    alike = len({v.shape[1:] for v in values}) == 1 and min(v.dim() for v in values) > 0
    lines = [v.double() if alike else v.double().reshape(-1, 1) for v in values]
    if sum(len(v) for v in lines) == 1:
        lines = [v.reshape(-1, 1) for v in lines]
    mean = torch.stack([v.sum(0) for v in lines]).sum(0) / sum(len(v) for v in lines)
    count = sum(v.numel() for v in lines)
    spread, square = (float(torch.stack([(v - c).square().sum() for v in lines]).sum()) / count for c in (mean, 0))
    return torch.tensor(max(spread, 1e-6 * square), device=values[0].device)
