"""Image data sets found on this machine; nothing is downloaded."""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ghostify.errors import GhostifyError

FASHION_MNIST = (
    Path("/usr/share/datasets/fashion-mnist"),
    Path(os.path.expanduser("~/.cache/torchvision/FashionMNIST/raw")),
    Path("data/FashionMNIST/raw"),
)
STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")
UNREADABLE = (OSError, EOFError, ValueError, IndexError, RuntimeError, zlib.error)


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images, N x C x H x W float32 with zero mean and unit variance, with the published split."""

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int


def fashion_mnist() -> LabelledImages | None:
    """60,000 + 10,000 images of 1 x 28 x 28 from a copy on this machine, or None where there is none."""
    folder = fashion_mnist_folder()
    if folder is None:
        return None
    try:
        train, train_labels, test, test_labels = (_read_idx(folder, stem) for stem in STEMS)
    except UNREADABLE as error:
        raise GhostifyError(
            f"{folder}: is not a complete copy of Fashion-MNIST ({type(error).__name__}: {error}). Install it again."
        ) from error
    train, test = (x[:, None].float().div(255).sub(0.2860).div(0.3530) for x in (train, test))
    return LabelledImages("Fashion-MNIST", train, train_labels.long(), test, test_labels.long(), 10)


def fashion_mnist_folder() -> Path | None:
    """The folder of a copy on this machine, or None."""
    return next((folder for folder in FASHION_MNIST if any(folder.glob("train-images*"))), None)


def digits() -> LabelledImages:
    """scikit-learn's 1,797 scanned digits of 1 x 8 x 8, every fifth in the test set; an extra, else `GhostifyError`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise GhostifyError(
            "digits: scikit-learn is not installed. "
            "Run pip install 'ghostify[demo]', or install Debian's dataset-fashion-mnist."
        ) from error
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None].div(16)
    images = (images - images.mean()) / images.std()
    labels = torch.from_numpy(data.target).long()
    test = torch.arange(len(images)) % 5 == 0
    return LabelledImages("scikit-learn digits", images[~test], labels[~test], images[test], labels[test], 10)


def _read_idx(folder: Path, stem: str) -> Tensor:
    """A uint8 array in the IDX format of MNIST: two zero bytes, a type byte, the rank, the sizes, the values."""
    path = next((p for p in sorted(folder.glob(f"{stem}*")) if p.is_file()), folder / stem)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3])]
    return torch.frombuffer(bytearray(content[4 + 4 * len(sizes) :]), dtype=torch.uint8).reshape(sizes)
