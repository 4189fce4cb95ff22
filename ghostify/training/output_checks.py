"""Checks of the outputs of student and teacher on the images, before training begins."""

from __future__ import annotations

from torch import Tensor, nn

from ghostify.data.training_data import TrainingData
from ghostify.errors import GhostifyError
from ghostify.graph.inputs import tensor_leaves
from ghostify.graph.modes import eval_mode
from ghostify.text import first_line


def check_outputs(student: nn.Module, teacher: nn.Module, data: TrainingData) -> None:
    """Raises `GhostifyError` where the models do not run on the first image, or their outputs differ in shape."""
    if not len(data.validation):  # type: ignore[arg-type]
        raise GhostifyError("data: has no validation images. Pass some.")
    image = data.validation[0][0]
    shapes, expected = (_output_shapes(model, image) for model in (student, teacher))
    if shapes != expected:
        raise GhostifyError(
            f"original: its outputs are {expected}, those of the model {shapes}. Pass the model that was converted."
        )


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
