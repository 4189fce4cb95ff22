"""How far the answers of a converted classifier are those of the original."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.lib.cells import Row

CONFIDENT, BEST = 0.5, 5


def agreement(outputs: Tensor, reference: Tensor) -> Row:
    """In percent of the pictures, of logits (N x classes); `confident` is None where the original never is.

    `agreement`: the same top-1. `confident`: the same, on pictures to which the original gives a probability of more
    than one half. `top5`: the original's top-1 is among the five largest outputs.
    """
    probability, answer = reference.softmax(1).max(1)
    same = (outputs.argmax(1) == answer).double()
    confident = probability > CONFIDENT
    within = (outputs.topk(min(BEST, outputs.shape[1]), 1).indices == answer[:, None]).any(1)
    return {
        "agreement": _percent(same),
        "confident": _percent(same[confident]) if confident.any() else None,
        "top5": _percent(within),
    }


def right(outputs: Tensor, labels: Tensor) -> Row:
    """How many answers are the labels, and of how many."""
    return {"right": int((outputs.argmax(1) == labels).sum()), "labelled": len(labels)}


def _percent(hits: Tensor) -> float:
    return 100 * hits.to(torch.float64).mean().item()
