"""Linear layers of N x features, seen as 1 x 1 convolutions of N x features x 1 x 1."""

from __future__ import annotations

import timm.layers
from torch import Tensor, fx, nn

from ghostify.graph.paths import called_module

LINEAR_CLASSES = (nn.Linear, timm.layers.Linear)
FEATURES_RANK = 2


def is_linear(module: nn.Module, node: fx.Node) -> bool:
    """Whether the node calls a linear layer of a known class, not of a subclass."""
    return node.op == "call_module" and type(called_module(module, node)) in LINEAR_CLASSES


def linear_as_conv(layer: nn.Linear) -> nn.Conv2d:
    """The 1 x 1 convolution that computes the same; its parameters share memory with the layer's."""
    conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None, device="meta")
    conv.weight = nn.Parameter(as_maps(layer.weight.detach()), layer.weight.requires_grad)
    conv.bias = layer.bias
    return conv.train(layer.training)


def as_maps(values: Tensor) -> Tensor:
    """N x C as N x C x 1 x 1, a view; other tensors as they are."""
    return values[:, :, None, None] if values.dim() == FEATURES_RANK else values
