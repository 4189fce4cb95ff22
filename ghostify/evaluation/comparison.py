"""Comparison of a converted model with its original on images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ghostify.errors import GhostifyError
from ghostify.evaluation.metrics import predict, relative_error, top1
from ghostify.graph.modes import eval_mode


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
        return isinstance(module(batch[:1]), Tensor)


def compare_models(
    module: nn.Module, original: nn.Module | None, batches: Sequence[Tensor], labels: Tensor | None
) -> Comparison:
    """Run both models on all batches and compare their outputs.

    Raises `GhostifyError` for a model whose output is not one tensor.
    """
    if not has_tensor_output(module, batches[0]):
        raise GhostifyError(
            f"{type(module).__name__}: its output is not one tensor. Compare models that return a tensor."
        )
    outputs, count = predict(module, batches), sum(map(len, batches))
    has_classes = outputs.dim() == 2
    accuracy = top1(outputs, labels) if labels is not None and has_classes else None
    if original is None:
        return Comparison(count, accuracy)
    reference = predict(original, batches)
    return Comparison(
        images=count,
        top1=accuracy,
        original_top1=top1(reference, labels) if labels is not None and has_classes else None,
        agreement=top1(outputs, reference.argmax(1)) if has_classes else None,
        error=relative_error(outputs, reference),
    )
