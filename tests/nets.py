"""Tiny networks, one for each structure of graphs."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set random BatchNorm statistics and affine parameters, none at a neutral value, and evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def rand(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator).to(like)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(rand(module.running_mean) * 0.2 - 0.1)
            module.running_var.copy_(rand(module.running_var) * 0.3 + 0.2)
            with torch.no_grad():
                module.weight.copy_(rand(module.weight) + 0.5)
                module.bias.copy_(rand(module.bias) - 0.3)
    return model.eval()


def conv_norm(inputs: int, outputs: int, **options) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Straight(nn.Module):
    """A chain of convolutions: every channel permutation can be pushed into the next one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = conv_norm(3, width)
        self.a = conv_norm(width, 2 * width)
        self.b = conv_norm(2 * width, 2 * width, stride=2)
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(self.stem(x))).mean((2, 3)))


class Residual(nn.Module):
    """A residual block with in-place activation and sum, and an identity shortcut."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = conv_norm(3, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.drop_path = DropPath(0.3)
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x += self.drop_path(y)
        return self.head(self.relu(x)).mean((2, 3))


class Inverted(nn.Module):
    """An inverted residual block; each map of its second half is nearly a multiple of one of its first."""

    def __init__(self, width: int = 8, spread: int = 6, squeeze: bool = False) -> None:
        super().__init__()
        expanded, half = spread * width, spread * width // 2
        self.stem = conv_norm(3, width)
        self.expand = nn.Sequential(nn.Conv2d(width, expanded, 1, bias=False), nn.BatchNorm2d(expanded), nn.ReLU())
        self.depthwise = conv_norm(expanded, expanded, groups=expanded)
        self.project = nn.Sequential(nn.Conv2d(expanded, width, 1, bias=False), nn.BatchNorm2d(width))
        self.squeeze = SqueezeExcitation(expanded, width) if squeeze else nn.Identity()
        self.head = nn.Conv2d(width, 5, 1)
        with torch.no_grad():
            for conv in (self.expand[0], self.depthwise[0]):
                conv.weight[half:] = conv.weight[:half] * 1.01

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.project(self.squeeze(self.depthwise(self.expand(x))))).mean((2, 3))


class Branches(nn.Module):
    """Two concatenated branches, a tensor with two users, functional dropout that follows the mode."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = conv_norm(3, width)
        self.left = conv_norm(width, width)
        self.right = nn.Conv2d(width, 12, 3, padding=1)
        self.last = conv_norm(width + 12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.cat((self.left(x), F.relu(self.right(x))), 1)
        return F.dropout(self.last(y), 0.5, training=self.training)


class Classifier(nn.Module):
    """Flattened maps and three linear layers, as in VGG; images of 12 x 12."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_norm(3, 8), conv_norm(8, 16)
        self.fc1, self.fc2, self.fc3 = nn.Linear(144, 32), nn.Linear(32, 24), nn.Linear(24, 5)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.b(self.a(x)), 4).flatten(1)
        return self.fc3(self.dropout(F.relu(self.fc2(F.relu(self.fc1(x))))))


class DenselyConnected(nn.Module):
    """Each layer reads the concatenation of all maps before it, normalised together, as in DenseNet."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.norm1, self.b = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.c = nn.BatchNorm2d(2 * width), nn.Conv2d(2 * width, width, 3, padding=1)
        self.norm3, self.d = nn.BatchNorm2d(3 * width), nn.Conv2d(3 * width, width, 1)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat((x, self.b(F.relu(self.norm1(x)))), 1)
        x = torch.cat((x, self.c(F.relu(self.norm2(x)))), 1)
        return self.fc(F.relu(self.d(F.relu(self.norm3(x)))).mean((2, 3)))


class Halves(nn.Module):
    """Halves of a convolution's maps that are used apart, as in YOLO's C2f; a slice, as in ReXNet."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_norm(3, width), conv_norm(width, 2 * width), conv_norm(width, width)
        self.c, self.head = nn.Conv2d(3 * width, width, 3, padding=1), nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(self.stem(x)).chunk(2, 1)
        x = self.c(torch.cat((left, right, right + self.b(right)), 1))
        return self.head(torch.cat((F.relu(x[:, :3]), x[:, 3:]), 1)).mean((2, 3))


class Shared(nn.Module):
    """A convolution that two nodes call."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = conv_norm(3, width)
        self.again = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.again(torch.tanh(self.again(x)))


class Functional(nn.Module):
    """`torch.nn.functional.conv2d` with parameters of the module, and one whose weight is computed."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(10, width, 3, 3) / 8)
        self.offset = nn.Parameter(torch.randn(10) / 8)
        self.other = nn.Parameter(torch.randn(6, 10, 3, 3) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.conv2d(x, self.kernel, self.offset, padding=1, stride=2)
        return F.conv2d(F.relu(x), self.other * 2, padding=1)


class Stubborn(nn.Module):
    """A child whose forward branches on the values of its input."""

    class Gate(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.mean() > 0 else -x

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = conv_norm(3, width)
        self.gate = self.Gate(width)
        self.last = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gate(self.stem(x)))


class Optional(nn.Module):
    """An optional input."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.last = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = self.last(F.relu(self.stem(x)))
        if bias is not None:
            x = x + bias
        return x * scale


class Wild(nn.Module):
    """An untraceable forward: a list of maps selected by their values, and a head for each; a traceable backbone."""

    class Backbone(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.stem = conv_norm(3, width)
            self.a = conv_norm(width, width)

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.a(self.stem(x))
            return [x, F.max_pool2d(x, 2)]

    class Head(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, width, 3, 3) / 8)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return F.conv2d(x, self.weight, padding=1) * scale

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.backbone = self.Backbone(width)
        self.gate = Stubborn.Gate(3)
        self.head = self.Head(width)

    def forward(self, x: Tensor) -> Tensor:
        maps = [m for m in self.backbone(x) if m.std() >= 0]
        first = self.gate(self.head(maps[0])[:, :3].abs())
        return torch.cat((first.mean((2, 3)), self.head(maps[1]).mean((2, 3))), 1)


class FunctionalUntraced(nn.Module):
    """An untraceable forward with a functional convolution in it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = conv_norm(3, width)
        self.weight = nn.Parameter(torch.randn(6, width, 3, 3) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.std() >= 0:
            x = F.conv2d(x, self.weight, padding=1)
        return x.mean((2, 3))


class Methods(Straight):
    """A forward that calls methods, as in timm's models."""

    num_classes = 5

    def forward_features(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


ALL = (Straight, Residual, Branches, Shared, Functional, Stubborn, Optional)


def images(count: int = 8, size: int = 12, seed: int = 1) -> Tensor:
    """N x 3 x size x size with the smoothness of photographs."""
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(noise, 3, 1, 1) * 2
