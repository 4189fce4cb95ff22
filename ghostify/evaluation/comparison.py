"""How well a converted model does on images, by itself and beside its original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ghostify.errors import GhostifyError
from ghostify.evaluation.metrics import predict, relative_error, top1
from ghostify.graph.modes import eval_mode


@dataclass(frozen=True)
class Comparison:
    """Percent right of each where there are labels, percent of same answers, and the outputs' relative error.

    None where there is nothing to compare with; percents need outputs of N x classes.
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
    """Run both on all batches; raises `GhostifyError` for a model whose output is not one tensor."""
    if not has_tensor_output(module, batches[0]):
        raise GhostifyError(f"{type(module).__name__}: its output is not one tensor, which comparing on images takes")
    answers, count = predict(module, batches), sum(map(len, batches))
    classes = answers.dim() == 2
    right = top1(answers, labels) if labels is not None and classes else None
    if original is None:
        return Comparison(count, right)
    reference = predict(original, batches)
    return Comparison(
        images=count,
        top1=right,
        original_top1=top1(reference, labels) if labels is not None and classes else None,
        agreement=top1(answers, reference.argmax(1)) if classes else None,
        error=relative_error(answers, reference),
    )
