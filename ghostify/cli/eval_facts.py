"""The results of `ghostify eval`: costs, accuracy, and the comparison with the original."""

from __future__ import annotations

from torch import nn

from ghostify.data.sources import ImageData
from ghostify.evaluation.comparison import compare_models
from ghostify.planning.cost import count_macs, count_parameters
from ghostify.timing.latency import interleaved_latency

LABELS = {
    "macs": "MACs per image",
    "top1_percent": "top-1 %",
    "original_macs": "original's MACs per image",
    "original_parameters": "original's parameters",
    "original_top1_percent": "original's top-1 %",
    "agreement_percent": "agreement with the original %",
    "speedup": "speedup (inference forms, eager, batch 1)",
}


def collect_facts(converted: nn.Module, original: nn.Module | None, data: ImageData) -> dict[str, int | float]:
    """Results by key; those that need labels or the original are there only with them."""
    example = data.batches[0][:1]
    comparison = compare_models(converted, original, data.batches, data.labels)
    facts: dict[str, int | float] = {"images": comparison.images}
    models = {"": (converted, comparison.top1), "original_": (original, comparison.original_top1)}
    for prefix, (model, accuracy) in models.items():
        if model is not None:
            facts[f"{prefix}macs"] = count_macs(model, example)
            facts[f"{prefix}parameters"] = count_parameters(model)
            if accuracy is not None:
                facts[f"{prefix}top1_percent"] = round(accuracy, 2)
    if comparison.agreement is not None:
        facts["agreement_percent"] = round(comparison.agreement, 2)
    if original is not None and comparison.error is not None:
        facts["relative_output_error"] = round(comparison.error, 5)
        original_ms, converted_ms = interleaved_latency([original, converted], example)
        facts["speedup"] = round(original_ms / converted_ms, 2)
    return facts
