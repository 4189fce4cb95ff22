"""Where models and images come from: names on the command line -> modules and batches."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import timm
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from ghostify.errors import GhostifyError
from ghostify.imports import import_object
from ghostify.text import format_shape

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
ARRAY_SUFFIXES = (".npy", ".npz", ".safetensors")


@dataclass(frozen=True)
class ModelSource:
    """A model by name - `timm:NAME`, `torchvision:NAME` or `module.path:callable` - and its constructor's arguments."""

    name: str
    arguments: Mapping[str, Any]

    def build(self) -> nn.Module:
        """The model with its initial weights; raises `GhostifyError` where the name or the arguments do not fit."""
        kind, _, name = self.name.partition(":")
        if not name:
            raise GhostifyError(
                f"model {self.name!r} is no name I know: use timm:NAME, torchvision:NAME or module.path:callable"
            )
        make = _maker(self.name, kind, name)
        try:
            model = make(**self.arguments)
        except Exception as error:
            raise GhostifyError(f"model {self.name!r} cannot be built: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise GhostifyError(f"model {self.name!r} gives a {type(model).__name__}, not an nn.Module")
        return model.eval()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a saved model's description."""
        return {"name": self.name, "arguments": dict(self.arguments)}


def _maker(full: str, kind: str, name: str) -> Callable[..., Any]:
    if kind == "timm":
        if not timm.is_model(name):
            near = ", ".join(difflib.get_close_matches(name, timm.list_models(), 3))
            raise GhostifyError(f"timm has no model {name!r}" + (f": it has {near}" if near else ""))
        return lambda **arguments: timm.create_model(name, pretrained=False, **arguments)
    if kind == "torchvision":
        if name not in torchvision.models.list_models():
            raise GhostifyError(f"torchvision has no model {name!r}: torchvision.models.list_models() lists them")
        return lambda **arguments: torchvision.models.get_model(name, weights=None, **arguments)
    try:
        return import_object(full)
    except (ImportError, AttributeError) as error:
        raise GhostifyError(f"model {full!r}: {error}: is it on the Python path?") from error


def parse_arguments(pairs: list[str]) -> dict[str, Any]:
    """`key=value` strings as constructor arguments; values are JSON where they can be, else text."""
    arguments = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise GhostifyError(f"argument {pair!r} is not of the form key=value")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return arguments


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs: size (C, H, W), timm's evaluation transform for this model, and what makes it up."""

    size: tuple[int, int, int]
    transform: Callable[[Image.Image], Tensor]
    config: Mapping[str, Any]


def preprocessing(model: nn.Module, size: tuple[int, int, int] | None = None) -> Preprocessing:
    """timm's own evaluation transform of the model; ImageNet's mean and deviation where the model says nothing."""
    config = resolve_data_config({} if size is None else {"input_size": size}, model=model)
    transform: Any = create_transform(**config, is_training=False)
    return Preprocessing(tuple(config["input_size"]), transform, config)


def blank_input(size: tuple[int, int, int]) -> Tensor:
    """One blank input, 1 x C x H x W."""
    return torch.zeros(1, *size)


@dataclass(frozen=True)
class ImageData:
    """Batches of inputs, and labels where there are any."""

    batches: tuple[Tensor, ...]
    labels: Tensor | None

    @property
    def images(self) -> int:
        return sum(len(batch) for batch in self.batches)


def read_data(path: str | Path, prepared: Preprocessing, *, limit: int | None = None, batch: int = 32) -> ImageData:
    """Inputs from a folder of images (classes as subfolders, if any), or from an array file.

    Labels are the places of the class folders in the alphabet: of a trained model's classes, all must be there. `.npy`
    holds N x C x H x W inputs; `.npz` and `.safetensors` hold them as `images`, and perhaps `labels`. Arrays are taken
    as they are; images go through the model's transform. Raises `GhostifyError` naming the file.
    """
    path = Path(path)
    if path.is_dir():
        files, classes = list_images(path)
        files = _sample_evenly(files, limit)
        labels = torch.tensor([classes.index(p.relative_to(path).parts[0]) for p in files]) if classes else None
        return ImageData(tuple(_images(files, prepared, batch)), labels)
    if path.suffix.lower() not in ARRAY_SUFFIXES:
        raise GhostifyError(f"{path}: is neither a folder of images nor one of {', '.join(ARRAY_SUFFIXES)}")
    images, labels = _arrays(path)
    if images.dim() != 4 or tuple(images.shape[1:2]) != prepared.size[:1]:
        expected = format_shape(("N", *prepared.size))
        raise GhostifyError(f"{path}: holds {format_shape(images.shape)}, the model takes {expected}")
    chosen = _sample_evenly(list(range(len(images))), limit)
    kept = images[chosen].float()
    return ImageData(tuple(kept.split(batch)), None if labels is None else labels[chosen])


def list_images(path: Path) -> tuple[list[Path], list[str]]:
    """The images in a folder, and its class folders by name: none where there is one alone, or images beside them."""
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise GhostifyError(f"{path}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    places = [p.relative_to(path).parts for p in files]
    classes = sorted({parts[0] for parts in places if len(parts) > 1})
    return files, [] if len(classes) < 2 or any(len(parts) == 1 for parts in places) else classes


def _sample_evenly(items: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` items, evenly spread, so that every class of a sorted listing is seen."""
    if limit is None or len(items) <= limit:
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def _images(files: list[Path], prepared: Preprocessing, batch: int) -> Iterator[Tensor]:
    for start in range(0, len(files), batch):
        yield torch.stack([read_image(file, prepared) for file in files[start : start + batch]])


def read_image(file: Path, prepared: Preprocessing) -> Tensor:
    """An image file as an input, grey where the model takes one channel."""
    try:
        with Image.open(file) as image:
            return prepared.transform(image.convert("L" if prepared.size[0] == 1 else "RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise GhostifyError(f"{file}: is no readable image: {error}") from error


def _arrays(path: Path) -> tuple[Tensor, Tensor | None]:
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False)), None
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                arrays = {k: torch.from_numpy(archive[k]) for k in archive.files}
        else:
            arrays = load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise GhostifyError(f"{path}: cannot be read: {error}") from error
    images = arrays.get("images", next(iter(arrays.values())) if len(arrays) == 1 else None)
    if images is None:
        raise GhostifyError(f"{path}: holds {', '.join(arrays) or 'nothing'}: name the inputs 'images'")
    labels = arrays.get("labels")
    return images, None if labels is None else labels.long().flatten()
