"""Checks of the outputs of student and teacher on the images, before training begins."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ghostify.data.training_data import TrainingData
from ghostify.errors import GhostifyError
from ghostify.graph.inputs import tensor_leaves
from ghostify.graph.modes import eval_mode
from ghostify.text import first_line, format_value


def check_outputs(student: nn.Module, teacher: nn.Module, data: TrainingData) -> int | None:
    """The number of the models' classes, where their outputs are N x classes.

    Raises `GhostifyError` where the images are not in pairs with labels, the models do not run on the first one, or
    their outputs differ in shape, and for labels beyond the classes.
    """
    image = [_first_image("training", data.train), _first_image("validation", data.validation)][1]
    shapes, expected = (_output_shapes(model, image) for model in (student, teacher))
    if shapes != expected:
        raise GhostifyError(
            f"original: its outputs are {expected}, those of the model {shapes}. Pass the model that was converted."
        )
    classes = expected[0][1] if expected and len(expected[0]) == 2 else None
    if data.labelled and classes is not None and data.classes > classes:
        raise _label_error(data.name, data.classes - 1, classes)
    return classes


def check_labels(labels: Tensor, classes: int | None) -> None:
    """Raises `GhostifyError` for labels that are not the numbers of classes."""
    if classes is None or labels.is_floating_point():
        return
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise _label_error("data", int(wrong[0]), classes)


def _label_error(name: str, label: int, classes: int) -> GhostifyError:
    return GhostifyError(
        f"{name}: has label {label}, the model has {classes} classes, counted from 0. "
        "Use the classes that the model was trained on."
    )


def _first_image(name: str, images: Any) -> Tensor:
    if not len(images):
        raise GhostifyError(f"data: has no {name} images. Pass some.")
    item = images[0]
    if not isinstance(item, tuple | list) or len(item) != 2 or not isinstance(item[0], Tensor):
        raise GhostifyError(f"data: a {name} image is {format_value(item)}. Let the dataset return (image, label).")
    return item[0]


def _output_shapes(model: nn.Module, image: Tensor) -> list[tuple[int, ...]]:
    try:
        with eval_mode(model):
            outputs = tensor_leaves(model(image[None].to(next(model.parameters()).device)))
    except Exception as error:
        raise GhostifyError(
            f"data: {type(model).__name__} does not run on its images ({type(error).__name__}: {first_line(error)}). "
            "Pass images of the size and channels that it takes."
        ) from error
    return [tuple(output.shape) for output in outputs]
