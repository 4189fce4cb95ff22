"""A network that computes pictures from the raw values of a colour sensor, and has dead and constant filters.

It is trained here on the calibration half of the composites and cached. Networks of this kind are trained with a high
learning rate and without norms, and end with filters that answer zero, or one value, on every image.
"""

from __future__ import annotations

import sys
from itertools import chain, pairwise

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ghostify.timing.latency import cache_folder

WIDTH, DEPTH, SIZE = 48, 6, 64
DEAD, CONSTANT = 6, 2  # filters of each hidden layer
STEPS, BATCH, RATE = 600, 16, 1e-3
NEAREST = (0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3)  # raw values for red, green and blue at the four places of a square


def demosaicking(pictures: Tensor) -> nn.Module:
    """The network, from the cache or trained now on pictures (uint8, N x 3 x H x W)."""
    path = cache_folder() / f"demosaicking-{STEPS}.safetensors"
    torch.manual_seed(0)
    model = Demosaicker()
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        _train(model, pictures)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    return model.eval()


class Demosaicker(nn.Module):
    """Of one raw map (N x 1 x H x W) three colours (N x 3 x H x W): what is nearest, and a correction of it.

    The convolutions run at half the resolution, on the four raw values of each square.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = [4, *[WIDTH] * (DEPTH + 1)]
        hidden = [(nn.Conv2d(c, n, 3, padding=1), nn.ReLU()) for c, n in pairwise(widths)]
        self.correction = nn.Sequential(*chain(*hidden), nn.Conv2d(WIDTH, len(NEAREST), 3, padding=1))
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)
            nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.convs[-1].weight)

    @property
    def convs(self) -> list[nn.Conv2d]:
        return [m for m in self.correction if isinstance(m, nn.Conv2d)]

    def forward(self, raw: Tensor) -> Tensor:
        values = F.pixel_unshuffle(raw, 2)
        return F.pixel_shuffle(values[:, NEAREST] + self.correction(values), 2)


def crops(pictures: Tensor, seed: int) -> Tensor:
    """One square of SIZE of each picture (float32 from 0 to 1), at any even place."""
    draw = torch.Generator().manual_seed(seed)
    corners = 2 * torch.randint((pictures.shape[-1] - SIZE) // 2 + 1, (len(pictures), 2), generator=draw)
    squares = [p[:, y : y + SIZE, x : x + SIZE] for p, (y, x) in zip(pictures, corners.tolist(), strict=True)]
    return torch.stack(squares).float() / 255


def mosaic(colours: Tensor) -> Tensor:
    """The raw values (N x 1 x H x W) of a sensor with red, green, green and blue in each square of four."""
    raw = colours[:, 1:2].clone()
    raw[..., ::2, ::2], raw[..., 1::2, 1::2] = colours[:, :1, ::2, ::2], colours[:, 2:, 1::2, 1::2]
    return raw


def psnr(outputs: Tensor, colours: Tensor) -> float:
    """The peak signal-to-noise ratio over all pictures together, in decibels."""
    return float(-10 * (outputs - colours).square().mean().log10())


def _train(model: nn.Sequential, pictures: Tensor) -> None:
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        silence(model)
        chosen = torch.randint(len(pictures), (BATCH,), generator=draw)
        colours = crops(pictures[chosen], step)
        loss = F.l1_loss(model(mosaic(colours)), colours)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"  training the demosaicking network: step {step} of {STEPS}, loss {float(loss):.4f}", file=sys.stderr
            )
    silence(model)


@torch.no_grad()
def silence(model: Demosaicker) -> None:
    """The first filters of each hidden layer answer zero on every image, the next ones one half."""
    for conv in model.convs[:-1]:
        assert conv.bias is not None
        conv.bias[:DEAD] = -100
        conv.weight[DEAD : DEAD + CONSTANT] = 0
        conv.bias[DEAD : DEAD + CONSTANT] = 0.5
