"""Models by name, and images and arrays in files as batches of inputs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from ghostify.arguments import a_module, a_path, a_sequence, an_integer, instance_of, optional, public
from ghostify.data.array_files import ARRAY_SUFFIXES, is_array_file, read_arrays
from ghostify.data.image_files import class_of, decode_image, list_images
from ghostify.errors import GhostifyError
from ghostify.imports import import_object

Item = TypeVar("Item")


@dataclass(frozen=True)
class ModelSource:
    """A model by name - `timm:NAME`, `torchvision:NAME` or `module.path:callable` - and its constructor's arguments."""

    name: str
    arguments: Mapping[str, Any]

    def build(self) -> nn.Module:
        """The model in eval mode with its initial weights; raises `GhostifyError` for wrong names or arguments."""
        kind, _, name = self.name.partition(":")
        if not name:
            raise GhostifyError(
                f"model {self.name!r}: unknown model name. Use timm:NAME, torchvision:NAME or module.path:callable."
            )
        constructor = _constructor(self.name, kind, name)
        try:
            model = constructor(**self.arguments)
        except Exception as error:
            raise GhostifyError(
                f"model {self.name!r}: cannot be built ({type(error).__name__}: {error}). Check its arguments."
            ) from error
        if not isinstance(model, nn.Module):
            raise GhostifyError(
                f"model {self.name!r}: returns a {type(model).__name__}. Name a callable that returns an nn.Module."
            )
        return model.eval()

    def to_dict(self) -> dict[str, Any]:
        """The source as JSON data, for the description of a saved model."""
        return {"name": self.name, "arguments": dict(self.arguments)}


def _constructor(full_name: str, kind: str, name: str) -> Callable[..., Any]:
    if kind == "timm":
        if not timm.is_model(name):
            similar = ", ".join(difflib.get_close_matches(name, timm.list_models(), 3))
            remedy = f"Similar names: {similar}." if similar else "timm.list_models() lists its models."
            raise GhostifyError(f"model {full_name!r}: timm has no model of this name. {remedy}")
        return lambda **arguments: timm.create_model(name, pretrained=False, **arguments)
    if kind == "torchvision":
        if name not in torchvision.models.list_models():
            raise GhostifyError(
                f"model {full_name!r}: torchvision has no model of this name. "
                f"torchvision.models.list_models() lists its models."
            )
        parameters = inspect.signature(torchvision.models.get_model_builder(name)).parameters
        untrained = {"weights_backbone": None} if "weights_backbone" in parameters else {}
        return lambda **arguments: torchvision.models.get_model(name, weights=None, **{**untrained, **arguments})
    if not all(part.isidentifier() for part in (*kind.split("."), *name.split("."))):
        raise GhostifyError(
            f"model {full_name!r}: is not a name of the form module.path:callable. Write it as in package.models:Net."
        )
    try:
        return import_object(full_name)
    except Exception as error:  # the module is the user's, and its import runs it
        problem = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise GhostifyError(f"model {full_name!r}: {problem}. Check the name and the Python path.") from error


@dataclass(frozen=True)
class Preprocessing:
    """The input size (C, H, W), timm's evaluation transform for a model, and the configuration of the transform."""

    size: tuple[int, int, int]
    transform: Callable[[Image.Image], Tensor]
    config: Mapping[str, Any]


def _a_size(name: str, value: Any) -> tuple[int, int, int]:
    """Channels, height and width; a check of arguments."""
    sizes = a_sequence(an_integer(1), "Pass (channels, height, width).")(name, value)
    if len(sizes) != 3:
        raise GhostifyError(f"{name}: has {len(sizes)} sizes. Pass (channels, height, width).")
    channels, height, width = sizes
    return channels, height, width


a_preprocessing = instance_of(Preprocessing, "Pass what preprocessing(model) returns.")


@public(model=a_module, size=optional(_a_size))
def preprocessing(model: nn.Module, size: tuple[int, int, int] | None = None) -> Preprocessing:
    """timm's evaluation transform for the model; ImageNet's mean and deviation where the model does not define them.

    A model of one channel gets their means over the three channels.
    """
    config = resolve_data_config({} if size is None else {"input_size": size}, model=model)
    if config["input_size"][0] == 1:
        config = {**config, **{key: (sum(config[key]) / len(config[key]),) for key in ("mean", "std")}}
    transform: Any = create_transform(**config, is_training=False)
    return Preprocessing(tuple(config["input_size"]), transform, config)


def blank_input(size: tuple[int, int, int]) -> Tensor:
    """An input of zeros, 1 x C x H x W, for a size (C, H, W)."""
    return torch.zeros(1, *size)


@dataclass(frozen=True)
class ImageData:
    """Batches of inputs, each N x C x H x W, and the labels of all images (N) where there are any."""

    batches: tuple[Tensor, ...]
    labels: Tensor | None

    @property
    def images(self) -> int:
        return sum(len(batch) for batch in self.batches)


@public(path=a_path, prepared=a_preprocessing, limit=optional(an_integer(1)), batch=an_integer(1))
def read_data(path: str | Path, prepared: Preprocessing, *, limit: int | None = None, batch: int = 32) -> ImageData:
    """Inputs from a folder of images (classes as subfolders, if any), or from an array file.

    Labels are the positions of the class folders in alphabetical order: all classes of a trained model must be present.
    `.npy` holds N x C x H x W inputs; `.npz` and `.safetensors` hold them as `images`, with optional `labels`. Images
    pass through the model's transform, arrays do not: their numbers, of whatever type, are the inputs. At most `limit`
    images are read, sampled evenly. Raises `GhostifyError` naming the file.
    """
    path = Path(path)
    if path.is_dir():
        all_files, classes = list_images(path)
        files = _sample_evenly(all_files, limit)
        labels = torch.tensor([classes.index(class_of(p, path)) for p in files]) if classes else None
        return ImageData(tuple(_read_batches(files, prepared, batch)), labels)
    if not is_array_file(path):
        raise GhostifyError(
            f"{path}: is neither a folder nor an array file. "
            f"Name a folder of images, or a {' or '.join(ARRAY_SUFFIXES)} file."
        )
    images, labels = read_arrays(path, prepared.size, lambda count: _sample_evenly(range(count), limit))
    return ImageData(images.split(min(batch, len(images))), labels)


def _sample_evenly(items: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """At most `limit` items, evenly spaced, so that a sorted listing keeps all its classes."""
    if limit is None or len(items) <= limit:
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def _read_batches(files: Sequence[Path], prepared: Preprocessing, batch: int) -> Iterator[Tensor]:
    for start in range(0, len(files), batch):
        yield torch.stack([read_image(file, prepared) for file in files[start : start + batch]])


def read_image(file: Path, prepared: Preprocessing) -> Tensor:
    """An image file as an input, C x H x W; in greyscale where the model has one input channel."""
    if prepared.size[0] not in (1, 3):
        raise GhostifyError(
            f"{file}: is an image of 3 channels, the model expects {prepared.size[0]}. Pass an array file."
        )
    return prepared.transform(decode_image(file, "L" if prepared.size[0] == 1 else "RGB"))
