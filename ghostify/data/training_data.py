"""Training data: from a name or a path to images and labels that come the same however often training is resumed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset, Sampler, Subset, TensorDataset

from ghostify.data.datasets import fashion_mnist
from ghostify.data.sources import ARRAY_SUFFIXES, Preprocessing, list_images, read_data, read_image
from ghostify.errors import GhostifyError

CIFAR10 = (Path("data"), Path.home() / ".cache/torchvision", Path("/usr/share/datasets"))
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
VALIDATION_EVERY = 20


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Images to train on and images to judge by, each with a label, -1 where there is none."""

    train: Dataset[Any]
    validation: Dataset[Any]
    labelled: bool


def load_training_data(data: str, prepared: Preprocessing, seed: int = 0) -> TrainingData:
    """The training set called `data`: "fashion-mnist", "cifar10", a folder, or an array file.

    A folder holds class folders, or `train` and `val` (or `test`) with class folders each, as ImageNet's, or images
    without labels; an array file `images` and perhaps `labels` (see `read_data`). Copies on this machine are read, none
    is fetched. Where nothing is set apart for validation, every twentieth image is, by seed. Raises `GhostifyError`
    naming the file.
    """
    if data == "fashion-mnist":
        return _arrays_of(data, fashion_mnist(), prepared, seed)
    if data == "cifar10":
        return _cifar10(seed)
    path = Path(data)
    if path.suffix.lower() in ARRAY_SUFFIXES:
        read = read_data(path, prepared, batch=2**30)
        return _split(_tensors(torch.cat(read.batches), read.labels), seed, read.labels is not None)
    if not path.is_dir():
        known = "fashion-mnist, cifar10, a folder of images, or an array file"
        raise GhostifyError(f"{data}: is no training set: use {known}")
    return _folder(path, prepared, seed)


class SeededDataset(Dataset[Any]):
    """A data set whose random augmentations depend on seed, epoch and image alone; its keys are (epoch, index)."""

    def __init__(self, items: Dataset[Any], seed: int) -> None:
        self.items, self.seed = items, seed

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        own = int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0])
        standing = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(own)
                random.seed(own)
                np.random.seed(own)
                return self.items[index]
        finally:
            random.setstate(standing[0])
            np.random.set_state(standing[1])


class EpochSampler(Sampler[tuple[int, int]]):
    """The keys of one epoch, in an order drawn by seed and epoch; begins after `skip` of them."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch, self.skip = count, seed, 0, 0

    def __len__(self) -> int:
        return self.count - self.skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        drawn = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        return ((self.epoch, int(k)) for k in drawn[self.skip :])


def _arrays_of(name: str, found: Any, prepared: Preprocessing, seed: int) -> TrainingData:
    if found is None:
        raise GhostifyError(f"{name}: is not on this machine (Debian: apt-get install dataset-{name})")
    if found.train.shape[1] != prepared.size[0]:
        raise GhostifyError(f"{name}: has {found.train.shape[1]} channel, the model takes {prepared.size[0]}")
    return _split(_tensors(found.train, found.train_labels), seed, labelled=True)


def _cifar10(seed: int) -> TrainingData:
    normal = [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(CIFAR_MEAN, CIFAR_STD)]
    moved = [torchvision.transforms.RandomCrop(32, 4), torchvision.transforms.RandomHorizontalFlip()]
    for root in CIFAR10:
        try:
            both = [
                torchvision.datasets.CIFAR10(root, transform=torchvision.transforms.Compose([*first, *normal]))
                for first in (moved, [])
            ]
        except RuntimeError:
            continue
        return _split(both[0], seed, labelled=True, judged=both[1])
    raise GhostifyError(f"cifar10: is not on this machine: put cifar-10-batches-py into {CIFAR10[0]}/")


def _folder(path: Path, prepared: Preprocessing, seed: int) -> TrainingData:
    config = {k: v for k, v in prepared.config.items() if k in ("input_size", "interpolation", "mean", "std")}
    moving: Any = create_transform(**config, is_training=True, color_jitter=0.0)
    inner = next((path / name for name in ("val", "validation", "test") if (path / name).is_dir()), None)
    try:
        if (path / "train").is_dir() and inner is not None:
            return TrainingData(
                torchvision.datasets.ImageFolder(path / "train", moving),
                torchvision.datasets.ImageFolder(inner, prepared.transform),
                labelled=True,
            )
        files, classes = list_images(path)
        if not classes:
            moved, still = _Unlabelled(files, replace(prepared, transform=moving)), _Unlabelled(files, prepared)
            return _split(moved, seed, labelled=False, judged=still)
        both = [torchvision.datasets.ImageFolder(path, t) for t in (moving, prepared.transform)]
    except FileNotFoundError as error:
        raise GhostifyError(f"{path}: {str(error).splitlines()[0]}") from error
    return _split(both[0], seed, labelled=True, judged=both[1])


class _Unlabelled(Dataset[Any]):
    """Image files, each with a -1."""

    def __init__(self, files: list[Path], prepared: Preprocessing) -> None:
        self.files, self.prepared = files, prepared

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return read_image(self.files[index], self.prepared), -1


def _tensors(images: Tensor, labels: Tensor | None) -> TensorDataset:
    return TensorDataset(images, torch.full((len(images),), -1) if labels is None else labels)


def _split(items: Any, seed: int, labelled: bool, judged: Any = None) -> TrainingData:
    order, held = np.random.default_rng(seed).permutation(len(items)).tolist(), len(items) // VALIDATION_EVERY or 1
    judging = Subset(items if judged is None else judged, sorted(order[:held]))
    return TrainingData(Subset(items, sorted(order[held:])), judging, labelled)
