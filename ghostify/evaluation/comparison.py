"""Comparison of a converted model with its original on images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ghostify.errors import GhostifyError
from ghostify.evaluation.metrics import predict, relative_error, run_on_images, top1
from ghostify.graph.modes import eval_mode
from ghostify.text import format_shape


@dataclass(frozen=True)
class Comparison:
    """Top-1 of both models on `images` images, their agreement (both in percent), and the relative output error.

    Top-1 is None without labels, agreement and error without an original; percentages need outputs of N x classes.
    """

    images: int
    top1: float | None = None
    original_top1: float | None = None
    agreement: float | None = None
    error: float | None = None


def has_tensor_output(module: nn.Module, batch: Tensor) -> bool:
    """Whether a model's output is one tensor."""
    with eval_mode(module):
        return isinstance(run_on_images(module, batch[:1]), Tensor)


def compare_models(
    module: nn.Module, original: nn.Module | None, batches: Sequence[Tensor], labels: Tensor | None
) -> Comparison:
    """Run both models on all batches and compare their outputs.

    Raises `GhostifyError` for a model whose output is not one tensor, for labels that are not one class for each image,
    and for an original with other outputs.
    """
    if not has_tensor_output(module, batches[0]):
        raise GhostifyError(
            f"{type(module).__name__}: its output is not one tensor. Compare models that return a tensor."
        )
    outputs, count = predict(module, batches), sum(map(len, batches))
    has_classes = outputs.dim() == 2
    if labels is not None and has_classes:
        _check_labels(labels, count, outputs.shape[1])
    accuracy = top1(outputs, labels) if labels is not None and has_classes else None
    if original is None:
        return Comparison(count, accuracy)
    reference = predict(original, batches)
    if reference.shape != outputs.shape:
        sizes = format_shape(reference.shape), format_shape(outputs.shape)
        raise GhostifyError(
            f"original: its outputs are {sizes[0]}, those of the model {sizes[1]}. Pass the model that was converted."
        )
    return Comparison(
        images=count,
        top1=accuracy,
        original_top1=top1(reference, labels) if labels is not None and has_classes else None,
        agreement=top1(outputs, reference.argmax(1)) if has_classes else None,
        error=relative_error(outputs, reference),
    )


def _check_labels(labels: Tensor, images: int, classes: int) -> None:
    """Raises `GhostifyError` where labels are not the number of a class for each image."""
    if labels.dim() != 1 or len(labels) != images:
        shape = format_shape(labels.shape) or "a scalar"
        raise GhostifyError(f"labels: are {shape} for {images} images. Pass one class number for each image.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise GhostifyError(f"labels: have type {labels.dtype}. Pass class numbers as integers.")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise GhostifyError(
            f"labels: class {int(wrong[0])} is not one of the model's {classes} classes (0 to {classes - 1}). "
            "Correct the labels, or pass none."
        )
