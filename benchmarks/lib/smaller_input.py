"""The simplest way to fewer multiply-accumulates: the same network on a smaller picture."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ghostify.planning.cost import count_macs

STEPS = 28  # sizes are multiples of the side / STEPS: of 8 pixels for 224


class SmallerInput(nn.Module):
    """A model on pictures (N x C x H x W) resized to `size` x `size`."""

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x: Tensor) -> Tensor:
        return self.model(F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True))


def smaller_input(model: nn.Module, example: Tensor, share: float) -> SmallerInput | None:
    """The largest size at no more than a share of the MACs; None if there is none."""
    side, limit = example.shape[-1], share * count_macs(model, example)
    sizes = dict.fromkeys(side * k // STEPS for k in range(STEPS, 0, -1))
    models = (SmallerInput(model, size) for size in sizes if size)
    return next((small for small in models if count_macs(small, example) <= limit), None)
