"""Runs of a traced model block by block on calibration images; between blocks, only the live values are kept."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from ghostify.fitting.calibration import CalibrationBatch, holdout_mask
from ghostify.graph.executor import run_node
from ghostify.graph.inputs import placeholders, values_of
from ghostify.reconstruction.blocks import Block

IMAGES_PER_BATCH = 16

Values = dict[str, Any]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(eq=False)
class ImageBatch:
    """Some images, in the holdout or not, and the live values of both models on them, by node."""

    size: int
    holdout: bool
    original: Values
    converted: Values


class BlockRunner:
    """A model that is run block by block."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.nodes = module, {n.name: n for n in module.graph.nodes}

    def run(self, block: Block, values: Values) -> Values:
        """The live values after the block, from those before it, which are not changed."""
        env = {self.nodes[name]: value for name, value in copy.deepcopy(values).items()}
        for node in (self.nodes[name] for name in block.nodes if name in self.nodes):
            env[node] = run_node(self.module, node, env)
        return {name: env[self.nodes[name]] for name in block.live}


def eval_copy(module: ModuleT) -> ModuleT:
    """A copy in evaluation mode without gradients; inference tensors, which cannot have any, become normal ones."""
    copied = copy.deepcopy(module).eval()
    for inner in copied.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None and parameter.is_inference():
                inner._parameters[name] = nn.Parameter(parameter.clone())
        for name, buffer in inner._buffers.items():
            if buffer is not None and buffer.is_inference():
                inner._buffers[name] = buffer.clone()
    return copied.requires_grad_(False)


def split_images(module: fx.GraphModule, batches: Iterable[CalibrationBatch]) -> Iterator[ImageBatch]:
    """Calibration batches split into about IMAGES_PER_BATCH images, with the holdout separate.

    A batch with inputs of several lengths is not split; an eighth of these batches is in the holdout.
    """
    batches = list(batches)
    image_count, batch_count = sum(batch.size for batch in batches), 1 + max(batch.number for batch in batches)
    names = [n.name for n in placeholders(module)]
    for batch in batches:
        inputs = values_of(batch.inputs)
        is_batched = [isinstance(v, Tensor) and v.dim() > 0 for v in inputs]
        if any(b and len(v) != batch.size for v, b in zip(inputs, is_batched, strict=True)):
            values = dict(zip(names, copy.deepcopy(inputs), strict=True))
            yield ImageBatch(batch.size, bool(holdout_mask(torch.tensor(batch.number), batch_count)), values, values)
            continue
        numbers = torch.arange(batch.first, batch.first + batch.size)
        for holdout in (False, True):
            selected = (holdout_mask(numbers, image_count) == holdout).nonzero()[:, 0]
            for index in (
                selected.tensor_split(max(1, round(len(selected) / IMAGES_PER_BATCH))) if len(selected) else ()
            ):
                images = [v[index.to(v.device)] if b else v for v, b in zip(inputs, is_batched, strict=True)]
                values = dict(zip(names, images, strict=True))
                yield ImageBatch(len(index), holdout, values, values)
