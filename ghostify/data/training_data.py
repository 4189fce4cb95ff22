"""Training and validation data by name or path, in an order that does not depend on interruptions of training."""

from __future__ import annotations

import os
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

from ghostify.arguments import a_path, a_seed, public
from ghostify.data.array_files import is_array_file
from ghostify.data.datasets import fashion_mnist
from ghostify.data.image_files import class_of, list_images
from ghostify.data.sources import Preprocessing, a_preprocessing, read_data, read_image
from ghostify.errors import GhostifyError

CIFAR10 = (Path("data"), Path(os.path.expanduser("~/.cache/torchvision")), Path("/usr/share/datasets"))
VALIDATION_FOLDERS = ("val", "validation", "test")
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
VALIDATION_EVERY = 20
DATASETS = ("fashion-mnist", "cifar10")


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Training images and validation images, each with a label, which is -1 where there is none.

    `name` is what the user called them. Labels are below `classes`, which is 0 where the largest one is not known.
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    labelled: bool
    name: str = "training data"
    classes: int = 0


@public(data=a_path, prepared=a_preprocessing, seed=a_seed)
def load_training_data(data: str, prepared: Preprocessing, seed: int = 0) -> TrainingData:
    """The training set called `data`: "fashion-mnist", "cifar10", a folder, or an array file.

    A folder holds class folders, or `train` and `val` (or `test`) with class folders each, like ImageNet, or images
    without labels; an array file holds `images` with optional `labels` (see `read_data`). Nothing is downloaded. Where
    there is no validation set, one in twenty images, drawn by `seed`, is used for validation instead of training.
    Raises `GhostifyError` naming the file.
    """
    if data == "fashion-mnist":
        return _fashion_mnist(prepared, seed)
    if data == "cifar10":
        return _cifar10(prepared, seed)
    path = Path(data)
    if is_array_file(path):
        arrays = read_data(path, prepared, batch=2**30)
        items, classes = _tensors(torch.cat(arrays.batches), arrays.labels), 0
        if arrays.labels is not None:
            classes = int(arrays.labels.max()) + 1
        return _split(items, seed, arrays.labels is not None, name=data, classes=classes)
    if not path.is_dir():
        raise GhostifyError(
            f"{data}: is not a training set. Use fashion-mnist, cifar10, a folder of images, or an array file."
        )
    return _folder(path, prepared, seed)


class SeededDataset(Dataset[Any]):
    """A data set whose random augmentations depend only on seed, epoch and image; its keys are (epoch, index)."""

    def __init__(self, items: Dataset[Any], seed: int) -> None:
        self.items, self.seed = items, seed

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        item_seed = int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0])
        python_state, numpy_state = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(item_seed)
                random.seed(item_seed)
                np.random.seed(item_seed)
                return self.items[index]
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class EpochSampler(Sampler[tuple[int, int]]):
    """The keys (epoch, index) of one epoch, shuffled by seed and epoch, without the first `skip` of them."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch, self.skip = count, seed, 0, 0

    def __len__(self) -> int:
        return self.count - self.skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        shuffled = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        return ((self.epoch, int(index)) for index in shuffled[self.skip :])


def _fashion_mnist(prepared: Preprocessing, seed: int) -> TrainingData:
    images = fashion_mnist()
    if images is None:
        raise GhostifyError(
            "fashion-mnist: is not on this machine. Install it (Debian: apt-get install dataset-fashion-mnist)."
        )
    if images.train.shape[1] != prepared.size[0]:
        raise GhostifyError(
            f"fashion-mnist: has {images.train.shape[1]} channel, the model expects {prepared.size[0]}. "
            f"Use a model with one input channel."
        )
    items = _tensors(images.train, images.train_labels)
    return _split(items, seed, labelled=True, name="fashion-mnist", classes=images.classes)


def _cifar10(prepared: Preprocessing, seed: int) -> TrainingData:
    if prepared.size[0] != 3:
        raise GhostifyError(f"cifar10: has 3 channels, the model expects {prepared.size[0]}. Use a model with three.")
    normalized = [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(CIFAR_MEAN, CIFAR_STD)]
    augmented = [torchvision.transforms.RandomCrop(32, 4), torchvision.transforms.RandomHorizontalFlip(), *normalized]
    for root in CIFAR10:
        try:
            train, validation = [
                torchvision.datasets.CIFAR10(root, transform=torchvision.transforms.Compose(transforms))
                for transforms in (augmented, normalized)
            ]
        except RuntimeError:
            continue
        return _split(train, seed, labelled=True, unaugmented=validation, name="cifar10", classes=10)
    raise GhostifyError(f"cifar10: is not on this machine. Put cifar-10-batches-py into {CIFAR10[0]}/.")


def _folder(path: Path, prepared: Preprocessing, seed: int) -> TrainingData:
    config = {k: v for k, v in prepared.config.items() if k in ("input_size", "interpolation", "mean", "std")}
    augmented = replace(prepared, transform=create_transform(**config, is_training=True, color_jitter=0.0))
    validation_folder = next((path / name for name in VALIDATION_FOLDERS if (path / name).is_dir()), None)
    if (path / "train").is_dir() and validation_folder is not None:
        train, validation = _class_folders(path / "train", augmented), _class_folders(validation_folder, prepared)
        if train.classes != validation.classes:
            different = sorted(set(train.classes) ^ set(validation.classes))[0]
            raise GhostifyError(
                f"{path}: class {different!r} is only in one of train and {validation_folder.name}. "
                f"Give both the same class folders."
            )
        return TrainingData(train, validation, labelled=True, name=str(path), classes=len(train.classes))
    files, classes = list_images(path)
    items, unaugmented = (_ImageFiles(files, path, classes, p) for p in (augmented, prepared))
    return _split(items, seed, labelled=bool(classes), unaugmented=unaugmented, name=str(path), classes=len(classes))


def _class_folders(path: Path, prepared: Preprocessing) -> _ImageFiles:
    """The images in class folders, of which one is enough."""
    files, classes = list_images(path)
    outside = [file for file in files if file.parent == path]
    if outside:
        raise GhostifyError(f"{outside[0]}: is in no class folder. Move the images into class folders.")
    return _ImageFiles(files, path, classes or [class_of(files[0], path)], prepared)


class _ImageFiles(Dataset[Any]):
    """Image files of a folder, each with the number of its class folder, or -1 where there are no classes."""

    def __init__(self, files: list[Path], folder: Path, classes: list[str], prepared: Preprocessing) -> None:
        self.files, self.classes, self.prepared = files, classes, prepared
        self.labels = [classes.index(class_of(file, folder)) if classes else -1 for file in files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return read_image(self.files[index], self.prepared), self.labels[index]


def _tensors(images: Tensor, labels: Tensor | None) -> TensorDataset:
    return TensorDataset(images, torch.full((len(images),), -1) if labels is None else labels)


def _split(
    items: Any, seed: int, labelled: bool, unaugmented: Any = None, *, name: str, classes: int = 0
) -> TrainingData:
    """Training items and one in `VALIDATION_EVERY` for validation; the latter from `unaugmented` where it is given."""
    indices, count = np.random.default_rng(seed).permutation(len(items)).tolist(), len(items) // VALIDATION_EVERY or 1
    validation = Subset(items if unaugmented is None else unaugmented, sorted(indices[:count]))
    return TrainingData(Subset(items, sorted(indices[count:])), validation, labelled, name, classes)
