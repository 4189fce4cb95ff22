"""The paper's compressed networks, as plans of the ordinary ones: parameters and MACs against its tables 3, 4, 6 and 7.

    python benchmarks/experiments/paper.py

GhostNet (Han et al., CVPR 2020) does not state how it counts. Each row names a convention that gives its figures.
"convolutions": every convolution is rewritten; MACs of convolutions only, parameters with norms and classifiers.
"intrinsic": the same without the cheap operations' MACs, norms and classifier. "all by s": the first convolution is
kept, MACs are the whole network's, and the classifier's parameters are counted as if divided by the ratio too; the
paper's 6.5 M are then 6.6. Results go to benchmarks/results/paper.json.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models import vgg16_bn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.tables import Row, options, publish
from ghostify import Policy, Rule, plan, trace
from ghostify.cli.demo_network import ResidualNet
from ghostify.planning.cost import count_parameters
from ghostify.planning.planner import Plan

VGG = {(2, 3): (7.7, 158), (3, 3): (5.2, 107), (4, 3): (4.0, 80), (5, 3): (3.3, 65)}
VGG_KERNELS = {(2, 1): (None, 157), (2, 5): (None, 160), (2, 7): (None, 163)}
RESNET56 = {(2, 3): (0.43, 63)}
RESNET50 = {(2, 3): (13.0, 2200), (4, 3): (6.5, 1200)}


def vgg16() -> nn.Module:
    """For 32 x 32 images: the thirteen convolutions with norms, and two linear layers."""
    features = list(vgg16_bn().features)[:-1]
    return nn.Sequential(
        *features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


class ResNet56(ResidualNet):
    """For 32 x 32 images, with shortcuts that have no parameters: every second pixel, zeros for the additional maps."""

    def __init__(self) -> None:
        super().__init__(56, 16, channels=3)
        for block in self.blocks:
            if isinstance(block.shortcut, nn.Sequential):
                block.shortcut = Padded(block.shortcut[0].out_channels)


class Padded(nn.Module):
    """Option A of He et al., 2015, section 4.2."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, ::2, ::2]
        missing = self.outputs - x.shape[1]
        return nn.functional.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))


def compressed(model: nn.Module, size: int, rule: Rule, keep_first: bool) -> tuple[Plan, int]:
    """The plan for all convolutions, or all but the first, and the number of parameters after it."""
    ghost_plan = plan(trace(model.eval(), torch.zeros(1, 3, size, size)), Policy((rule,), keep_first))
    saved = sum(e.macs_before - e.macs_after for e in ghost_plan.rewrites)
    return ghost_plan, count_parameters(model) - saved


def parameters_of(classes: type[nn.Module] | tuple[type[nn.Module], ...], model: nn.Module) -> int:
    """Parameters of modules of a class."""
    return sum(p.numel() for m in model.modules() if isinstance(m, classes) for p in m.parameters(recurse=False))


def counts(model: nn.Module, size: int, ratio: float, dw_size: int, convention: str) -> tuple[float, float]:
    """Millions of parameters and of MACs, by a convention."""
    ghost_plan, parameters = compressed(model, size, Rule(ratio=ratio, dw_size=dw_size), convention == "all by s")
    linear = parameters_of(nn.Linear, model)
    macs = (ghost_plan.macs_after or 0) - linear
    if convention == "intrinsic":
        cheap = [(e, e.layout.macs_per_position) for e in ghost_plan.rewrites]
        macs -= sum(each * sum(call.output_positions or 0 for call in e.conv.calls) for e, each in cheap)
        parameters -= parameters_of(nn.BatchNorm2d, model) + linear
    if convention == "all by s":
        parameters -= linear - round(linear / ratio)
        macs += linear
    return parameters / 1e6, macs / 1e6


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    tables = (
        ("VGG-16, CIFAR-10", vgg16(), 32, VGG | VGG_KERNELS, "convolutions"),
        ("ResNet-56, CIFAR-10", ResNet56(), 32, RESNET56, "intrinsic"),
        ("ResNet-50, ImageNet", torchvision.models.resnet50(), 224, RESNET50, "all by s"),
    )
    for network, model, size, published, convention in tables:
        for (ratio, dw_size), (weights, macs) in published.items():
            counted, plain = (counts(model, size, ratio, dw_size, c) for c in (convention, "convolutions"))
            yield {
                "how": f"{network}, s = {ratio}, d = {dw_size}",
                "params": counted[0],
                "macs": counted[1],
                "paper": [weights, macs],
                "plain": plain,
                "convention": convention,
            }


def main() -> None:
    options(__doc__).parse_args()
    publish("paper", rows())


if __name__ == "__main__":
    main()
