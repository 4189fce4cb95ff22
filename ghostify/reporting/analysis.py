"""What a reader of a report looks for: who was left alone and why, who costs the most, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ghostify.summary import LayerReport, Report

SHOWN = 5
SLOWER = 1.02

Times = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class SkippedGroup:
    """Convolutions that stayed as they were for one reason, and their share of the model's MACs."""

    reason: str
    names: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class LayerCost:
    """A rewritten convolution, its share of the outputs' expected error, and of the MACs that were saved."""

    line: LayerReport
    error_share: float
    saved_share: float


@dataclass(frozen=True)
class Suggestion:
    """Something to change, why, and the option that does it."""

    text: str
    option: str


def skipped_by_reason(found: Report) -> list[SkippedGroup]:
    """By reason, the largest share first."""
    total = found.macs_before or sum(line.macs_before for line in found.layers) or 1
    reasons = dict.fromkeys(line.skip_reason for line in found.layers if line.skip_reason is not None)
    grouped = []
    for reason in reasons:
        own = [line for line in found.layers if line.skip_reason == reason]
        share = sum(line.macs_before for line in own) / total
        grouped.append(SkippedGroup(reason, tuple(line.name for line in own), share))
    return sorted(grouped, key=lambda left: -left.share)


def layer_costs(found: Report) -> list[LayerCost]:
    """Every rewritten layer, the one that costs most first: by the outputs' expected errors, or by the layers' own
    relative errors where those are unknown of all."""
    lines = [line for line in found.layers if line.skip_reason is None]
    known = any(line.output_error is not None for line in lines)
    whole = [(line.output_error if known else line.holdout_error or line.fit_error) or 0.0 for line in lines]
    saved = [line.macs_before - line.macs_after for line in lines]
    each = zip(lines, whole, saved, strict=True)
    shares = [LayerCost(line, lost / (sum(whole) or 1), less / (sum(saved) or 1)) for line, lost, less in each]
    return sorted(shares, key=lambda c: -c.error_share)


def suggestions(found: Report, times: Times | None = None) -> list[Suggestion]:
    """What to change: layers that cost more than they save, and layers that became no faster."""
    said = []
    for one in layer_costs(found)[:SHOWN]:
        if one.error_share > 2 * one.saved_share and one.error_share > 0.05:
            text = (
                f"{one.line.name} causes {one.error_share:.0%} of the expected error and saves {one.saved_share:.1%} "
                "of what is saved: leave it as it was"
            )
            said.append(Suggestion(text, f"--ignore {one.line.name}"))
    slower = [name for name, (before, after) in (times or {}).items() if after > SLOWER * before]
    if slower:
        text = f"{', '.join(slower)} became slower here: leave them as they were, or let a budget of latency decide"
        said.append(Suggestion(text, "--cheap auto --budget latency=0.7"))
    gathered = [x.name for x in found.layers if x.reorders_output and x.layout is not None and not x.layout.is_low_rank]
    if gathered:
        text = (
            f"{', '.join(gathered)} put channels in order by an index, which costs a copy: pointwise ghosts need none"
        )
        said.append(Suggestion(text, "--cheap pointwise"))
    if not found.images and found.rewritten:
        said.append(
            Suggestion("nothing was fitted to images: a few hundred unlabelled ones help most", "--calibration DIR")
        )
    return said
