"""A traced model run block by block, on images of which only the values live between blocks are kept."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ghostify.fitting.calibration import CalibrationBatch, holdout_mask
from ghostify.graph.executor import run_node
from ghostify.graph.inputs import placeholders, values_of
from ghostify.reconstruction.blocks import Block

IMAGES = 16

Values = dict[str, Any]


@dataclass(eq=False)
class ImageBatch:
    """Some images on their way through both models: the values live there, by node. Held-out ones only judge."""

    size: int
    holdout: bool
    original: Values
    converted: Values


class BlockRunner:
    """A model that runs block by block."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.nodes = module, {n.name: n for n in module.graph.nodes}

    def run(self, block: Block, values: Values) -> Values:
        """What is live behind the block, from what is live before it, which stays as it is."""
        env = {self.nodes[name]: value for name, value in copy.deepcopy(values).items()}
        for node in (self.nodes[name] for name in block.nodes if name in self.nodes):
            env[node] = run_node(self.module, node, env)
        return {name: env[self.nodes[name]] for name in block.live}


def eval_copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in evaluation mode of which nothing asks for gradients; not of inference tensors, which cannot."""
    made = copy.deepcopy(module).eval()
    for inner in made.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None and parameter.is_inference():
                inner._parameters[name] = nn.Parameter(parameter.clone())
        for name, buffer in inner._buffers.items():
            if buffer is not None and buffer.is_inference():
                inner._buffers[name] = buffer.clone()
    return made.requires_grad_(False)


def split_images(module: fx.GraphModule, batches: Iterable[CalibrationBatch]) -> Iterator[ImageBatch]:
    """Calibration batches cut to about IMAGES; one that is not all of one length stays whole, every eighth held out."""
    names = [n.name for n in placeholders(module)]
    for batch in batches:
        inputs = values_of(batch.inputs)
        batched = [isinstance(v, Tensor) and v.dim() > 0 for v in inputs]
        if any(b and len(v) != batch.size for v, b in zip(inputs, batched, strict=True)):
            values = dict(zip(names, copy.deepcopy(inputs), strict=True))
            yield ImageBatch(batch.size, bool(holdout_mask(torch.tensor(batch.number))), values, values)
            continue
        number = torch.arange(batch.first, batch.first + batch.size)
        for held in (False, True):
            chosen = (holdout_mask(number) == held).nonzero()[:, 0]
            for index in chosen.tensor_split(max(1, round(len(chosen) / IMAGES))) if len(chosen) else ():
                taken = [v[index.to(v.device)] if b else v for v, b in zip(inputs, batched, strict=True)]
                values = dict(zip(names, taken, strict=True))
                yield ImageBatch(len(index), held, values, values)
