"""Real saved folders that the fuzzer changes: one for each structure of models that `save` can write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ghostify import ghostify, load, save
from tests import nets

FORMAT1 = Path(__file__).parent / "data/format1"
INPUTS = "inputs.safetensors"  # beside the folder, not in it


class Activations(nn.Module):
    """Convolutions with PReLU, GELU and GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(8)
        self.b, self.norm = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.norm(self.b(self.act(self.a(x)))))


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 6, 3, padding=1) for n in (3, 6, 6))
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@dataclass(frozen=True)
class Sample:
    """A saved folder, and the tensors that its model gets."""

    folder: Path

    @property
    def allow(self) -> tuple[str, ...]:
        """The classes of its own that it may name."""
        return ()

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def text(self) -> str:
        return (self.folder / "ghostify.json").read_text()

    @cached_property
    def inputs(self) -> list[Tensor]:
        tensors = load_file(self.folder.with_name(f"{self.name}.{INPUTS}"))
        return [tensors[name] for name in sorted(tensors) if name.startswith("input")]

    def content(self) -> dict[str, Any]:
        """A copy of its description, without the digest."""
        content = json.loads(self.text)
        del content["digest"]
        return content


def _timm() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).eval()


def _torchvision() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.shufflenet_v2_x0_5(num_classes=3).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "straight": nets.Straight,
    "residual": nets.Residual,
    "branches": nets.Branches,
    "shared": nets.Shared,
    "functional": nets.Functional,
    "activations": Activations,
    "tied": Tied,
    "timm": _timm,
    "torchvision": _torchvision,
}
SOURCES = {
    "timm": {"name": "timm:test_resnet", "arguments": {"num_classes": 3}, "input_size": [3, 32, 32]},
    "torchvision": {
        "name": "torchvision:shufflenet_v2_x0_5",
        "arguments": {"num_classes": 3},
        "input_size": [3, 32, 32],
    },
}
OLD = ("narrow", "guards", "nested", "activated", "timm-test-resnet")  # of format 1
AGAIN = ("narrow", "nested")  # of format 1, saved in the present format: pruned, and with graphs inside classes


def write_samples(place: Path, names: Collection[str] | None = None) -> list[Sample]:
    """Write the samples of these names, or all, into a folder."""

    def wanted(candidates: Iterable[str], prefix: str = "") -> Iterator[tuple[str, str]]:
        return ((n, f"{prefix}{n}") for n in candidates if names is None or f"{prefix}{n}" in names)

    for name, _ in wanted(MODELS):
        torch.manual_seed(0)
        size = 32 if name in SOURCES else 12
        save(ghostify(nets.settle(MODELS[name]())), place / name, source=SOURCES.get(name))
        save_file({"input": nets.images(2, size)}, place / f"{name}.{INPUTS}")
    for name, old in wanted(OLD, "old-"):
        shutil.copytree(FORMAT1 / name, place / old)
        shutil.copy(FORMAT1 / f"{name}.io.safetensors", place / f"{old}.{INPUTS}")
    for name, again in wanted(AGAIN, "again-"):
        save(load(FORMAT1 / name), place / again)
        shutil.copy(FORMAT1 / f"{name}.io.safetensors", place / f"{again}.{INPUTS}")
    return read_samples(place)


def read_samples(place: Path) -> list[Sample]:
    """The samples that `write_samples` wrote."""
    return [Sample(folder) for folder in sorted(place.iterdir()) if folder.is_dir()]
