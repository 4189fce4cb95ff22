"""Skipped layers by reason, layers with the largest error, and suggestions for the next conversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ghostify.summary import LayerReport, Report

LAYERS_CHECKED = 5
MAX_ERROR_TO_SAVING = 2
MIN_ERROR_SHARE = 0.05
MIN_SLOWDOWN = 1.02

LatencyPairs = Mapping[str, tuple[float, float]]  # by layer: ms before and after


@dataclass(frozen=True)
class SkippedGroup:
    """Convolutions that were skipped for one reason, and their share of the model's MACs."""

    reason: str
    names: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class LayerErrorShare:
    """A rewritten convolution with its share of the predicted output error, and of the MACs saved."""

    layer: LayerReport
    error_share: float
    saved_share: float


@dataclass(frozen=True)
class Suggestion:
    """A change with its reason, and the option that makes it."""

    text: str
    option: str


def skipped_by_reason(report: Report) -> list[SkippedGroup]:
    """The skipped convolutions, a group for each reason, the largest share of the MACs first."""
    total = report.macs_before or sum(layer.macs_before for layer in report.layers) or 1
    reasons = dict.fromkeys(layer.skip_reason for layer in report.layers if layer.skip_reason is not None)
    groups = []
    for reason in reasons:
        layers = [layer for layer in report.layers if layer.skip_reason == reason]
        share = sum(layer.macs_before for layer in layers) / total
        groups.append(SkippedGroup(reason, tuple(layer.name for layer in layers), share))
    return sorted(groups, key=lambda group: -group.share)


def layer_costs(report: Report) -> list[LayerErrorShare]:
    """Every rewritten convolution, the largest share of the error first.

    Shares are of the predicted output errors, or of the layers' own relative errors if no output error is known.
    """
    layers = [layer for layer in report.layers if layer.skip_reason is None]
    has_output_errors = any(layer.output_error is not None for layer in layers)
    errors = [
        (layer.output_error if has_output_errors else layer.holdout_error or layer.fit_error) or 0.0 for layer in layers
    ]
    savings = [layer.macs_before - layer.macs_after for layer in layers]
    costs = [
        LayerErrorShare(layer, error / (sum(errors) or 1), saving / (sum(savings) or 1))
        for layer, error, saving in zip(layers, errors, savings, strict=True)
    ]
    return sorted(costs, key=lambda cost: -cost.error_share)


def suggestions(report: Report, latencies: LatencyPairs | None = None) -> list[Suggestion]:
    """Changes for layers that lose more than they save, became slower, or need a gather; and calibration images."""
    return [
        *_costly_layers(report),
        *_slower_layers(latencies or {}),
        *_reordered_layers(report),
        *_missing_images(report),
    ]


def _costly_layers(report: Report) -> Iterator[Suggestion]:
    for cost in layer_costs(report)[:LAYERS_CHECKED]:
        if cost.error_share > MAX_ERROR_TO_SAVING * cost.saved_share and cost.error_share > MIN_ERROR_SHARE:
            text = (
                f"{cost.layer.name} causes {cost.error_share:.0%} of the predicted error and saves only "
                f"{cost.saved_share:.1%} of the saved MACs: skip it"
            )
            yield Suggestion(text, f"--ignore {cost.layer.name}")


def _slower_layers(latencies: LatencyPairs) -> Iterator[Suggestion]:
    names = [name for name, (before, after) in latencies.items() if after > MIN_SLOWDOWN * before]
    if names:
        text = f"slower than before on this machine: {', '.join(names)}. Skip them, or set a latency budget"
        yield Suggestion(text, "--cheap auto --budget latency=0.7")


def _reordered_layers(report: Report) -> Iterator[Suggestion]:
    layers = [x for x in report.layers if x.reorders_output and x.layout is not None and not x.layout.is_low_rank]
    if layers:
        names = ", ".join(layer.name for layer in layers)
        text = f"a gather, which costs a copy, restores the channel order of {names}: pointwise ghosts need none"
        yield Suggestion(text, "--cheap pointwise")


def _missing_images(report: Report) -> Iterator[Suggestion]:
    if not report.images and report.rewritten:
        text = "the fit used no images: a few hundred unlabelled ones reduce the error most"
        yield Suggestion(text, "--calibration DIR")
