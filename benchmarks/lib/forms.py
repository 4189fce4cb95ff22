"""Networks and the forms that are timed: original, converted, and compressed by two other methods."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.lib.rivals import factored, pruned
from ghostify import ghostify

NETWORKS = ("vgg16_bn", "resnet18", "resnet34", "resnet50", "densenet121", "mobilenet_v2")
HALF, LATENCY_SHARE = 0.5, 0.55
FORMS: dict[str, Callable[[nn.Module, Tensor, str], nn.Module]] = {
    "original": lambda model, *_: ghostify(model, 1),
    "ratio 2, depthwise": lambda model, x, _: ghostify(model, 2, example_inputs=x),
    "ratio 2, pointwise": lambda model, x, _: ghostify(model, 2, cheap="pointwise", example_inputs=x),
    "half the MACs": lambda model, x, _: ghostify(model, cheap="auto", budget={"macs": HALF}, example_inputs=x),
    "half the MACs, 0.55 of the time": lambda model, x, runtime: ghostify(
        model, cheap="auto", budget={"macs": HALF, "latency": LATENCY_SHARE}, runtime=runtime, example_inputs=x
    ),
    "Torch-Pruning, half the MACs": lambda model, x, _: ghostify(pruned(model, x, HALF), 1),
    "low rank, half the MACs": lambda model, x, _: ghostify(factored(model, x, HALF), 1),
}
TIMED = "half the MACs, 0.55 of the time"


def build(network: str) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(network, weights=None).eval()
