"""The residual network of the demo and the benchmarks, and its training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al., 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualNet(nn.Module):
    """The CIFAR residual network of depth 6 b + 2 with `width`, 2 and 4 `width` maps (He et al., 2015, section 4.2)."""

    def __init__(self, depth: int = 20, width: int = 16, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        blocks, widths = (depth - 2) // 6, (width, 2 * width, 4 * width)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        layers, inputs = [], width
        for stage, maps in enumerate(widths):
            for block in range(blocks):
                layers.append(ResidualBlock(inputs, maps, 2 if stage and not block else 1))
                inputs = maps
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: float,
    learning_rate: float = 0.2,
    batch: int = 128,
    weight_decay: float = 5e-4,
    flip: bool = True,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Train in place by one-cycle SGD with bfloat16 autocast, random shifts and flips; returns the number of steps.

    `images` (N x channels x height x width) and `labels` (N) are on the CPU. `on_progress(step, steps)` is called after
    each step. The model is in evaluation mode afterwards.
    """
    generator = torch.Generator().manual_seed(seed)
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=weight_decay, nesterov=True)
    steps = max(8, int(epochs * (len(images) // batch)))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.25)
    remaining = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(remaining) < batch:
            remaining = torch.randperm(len(images), generator=generator)
        index, remaining = remaining[:batch], remaining[batch:]
        x = _augment(images[index], flip, generator).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_progress:
            on_progress(step + 1, steps)
    model.eval()
    return steps


def _augment(x: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Images shifted by up to a 14th of their width, and half of them mirrored where `flip` is set."""
    pad = max(1, x.shape[-1] // 14)
    top, left = torch.randint(0, 2 * pad + 1, (2,), generator=generator).tolist()
    x = F.pad(x, (pad,) * 4, value=float(x.min()))[..., top : top + x.shape[-2], left : left + x.shape[-1]]
    mirrored = (torch.rand(len(x), generator=generator) < 0.5) & flip
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)
