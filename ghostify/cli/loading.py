"""The models and images that the arguments of a command name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ghostify.cli.parsing import parse_arguments
from ghostify.data.saved_source import parse_saved_source
from ghostify.data.sources import ImageData, ModelSource, Preprocessing, preprocessing, read_data
from ghostify.errors import GhostifyError
from ghostify.evaluation.metrics import predict, top1
from ghostify.graph.modes import eval_mode
from ghostify.io.checkpoint import load, load_weights
from ghostify.search.pareto import Evaluate
from ghostify.summary import conversion_info


@dataclass(frozen=True, eq=False)
class LoadedPair:
    """A converted model and its original, how images become their inputs, and where the original came from.

    The original has initial weights where no checkpoint was given.
    """

    converted: nn.Module
    original: nn.Module
    preprocessing: Preprocessing
    source: dict[str, Any]


def model_source(model: str, arguments: list[str] | None) -> ModelSource:
    """The model of that name with the constructor arguments `key=value`."""
    return ModelSource(model, parse_arguments(arguments))


def build_model(
    source: ModelSource, weights: Path | None, size: tuple[int, int, int] | None
) -> tuple[nn.Module, Preprocessing]:
    """A model, with a checkpoint's weights if one is given, and how images become its inputs."""
    model = source.build()
    if weights is not None:
        load_weights(model, weights)
    return model, preprocessing(model, size)


def load_pair(folder: Path, original: Path | None, allow: list[str] | None) -> LoadedPair:
    """The converted model of a folder and its original, with the weights of the checkpoint `original` if one is given.

    Raises `GhostifyError` for a folder that does not name the original, or names it as code that is not in `allow`.
    """
    converted = load(folder, allow=allow or ())
    source = conversion_info(converted).source
    if not source:
        raise GhostifyError(f"{folder}: does not name the original model. Convert it with `ghostify convert`.")
    saved = parse_saved_source(source, folder, allow or ())
    model, prepared = build_model(saved.model, original, saved.input_size)
    return LoadedPair(converted, model, prepared, source)


def check_labels(path: Path, data: ImageData, model: nn.Module) -> None:
    """Raise `GhostifyError` for a label that is not one of the classes of a model with outputs of N x classes."""
    if data.labels is None:
        return
    with eval_mode(model):
        outputs = model(data.batches[0][:1])
    largest = int(data.labels.max())
    if isinstance(outputs, Tensor) and outputs.dim() == 2 and largest >= outputs.shape[1]:
        raise GhostifyError(
            f"{path}: has label {largest}, the model has {outputs.shape[1]} classes, counted from 0. "
            f"Use the classes that the model was trained on."
        )


def top1_evaluator(path: Path, prepared: Preprocessing, batch: int, network: nn.Module) -> Evaluate:
    """A function that returns the top-1 in percent on labelled images of models with the outputs of `network`."""
    data = read_data(path, prepared, batch=batch)
    labels = data.labels
    if labels is None:
        raise GhostifyError(f"{path}: has no labels. Use class folders, or an array file with 'labels'.")
    check_labels(path, data, network)
    return lambda model: top1(predict(model, data.batches), labels)
