"""The charts of a report as Vega-Lite by Altair: plain data in, plain data out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from ghostify.errors import GhostifyError
from ghostify.reporting.analysis import layer_costs
from ghostify.reporting.outcome import DEPTHWISE, PRUNED, SKIPPED, WIDER, outcome_of
from ghostify.search.costs import COSTS
from ghostify.summary import Report

COLOURS = {SKIPPED: "#9a9a9a", DEPTHWISE: "#0b6e99", WIDER: "#b45309", PRUNED: "#6d28d9"}
BAR_PIXELS = 15
MAX_ERROR_BARS = 15
FRONTIER_BARS = 16
MIN_BARS = 4


def require_altair() -> Any:
    """The library; raises `GhostifyError` where it is not installed."""
    try:
        return importlib.import_module("altair")
    except ImportError as error:
        raise GhostifyError(
            "HTML report: altair and vl-convert are not installed. Run pip install 'ghostify[report]'."
        ) from error


def layers_chart(report: Report) -> dict[str, Any]:
    """A light bar for each convolution's MACs before, and a bar in front of it for those after, coloured by outcome."""
    alt = require_altair()
    rows = [
        {
            "layer": layer.name,
            "before": layer.macs_before,
            "after": layer.macs_after,
            "outcome": outcome_of(layer),
            "skip reason": layer.skip_reason or "",
        }
        for layer in report.layers
    ]
    order = [layer.name for layer in report.layers]
    base = alt.Chart(alt.Data(values=rows)).encode(y=_layer_axis(alt, order))
    names = [alt.Tooltip(f"{key}:N") for key in ("layer", "outcome", "skip reason")]
    counts = [alt.Tooltip(f"{key}:Q", format=".3s") for key in ("before", "after")]
    before = base.mark_bar(color="#dddddd").encode(
        x=alt.X("before:Q", title="multiply-accumulates", axis=alt.Axis(format="~s", tickCount=4))
    )
    after = base.mark_bar(height={"band": 0.6}).encode(x="after:Q", color=_colours(alt), tooltip=[*names, *counts])
    return _sized(before + after, "Multiply-accumulates of each convolution, before (light) and after", len(rows))


def error_chart(report: Report) -> dict[str, Any]:
    """A bar for each of the layers with the largest error: its share of the predicted output error."""
    alt = require_altair()
    costs = layer_costs(report)[:MAX_ERROR_BARS]
    rows = [
        {
            "layer": cost.layer.name,
            "error share": cost.error_share,
            "share of the saved MACs": cost.saved_share,
            "outcome": outcome_of(cost.layer),
        }
        for cost in costs
    ]
    tooltips = [alt.Tooltip(f"{key}:Q", format=".1%") for key in ("error share", "share of the saved MACs")]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            y=_layer_axis(alt, [cost.layer.name for cost in costs]),
            x=alt.X("error share:Q", title="share of the error", axis=alt.Axis(format="%", tickCount=4)),
            color=_colours(alt),
            tooltip=["layer:N", "outcome:N", *tooltips],
        )
    )
    return _sized(chart, "Share of the error by layer", len(rows))


def frontier_chart(curve: Sequence[Mapping[str, Any]], macs_share: float | None) -> dict[str, Any]:
    """The measured drop, or else the predicted error, by the share of the cost; a rule at this model's `macs_share`."""
    alt = require_altair()
    cost = _cost_of(curve)
    has_drops = all(point.get("drop") is not None for point in curve)
    key, title = ("drop", "drop in points") if has_drops else ("error", "predicted output error")
    rows = [{"share": point["shares"][cost], key: point[key]} for point in curve]
    x = alt.X(
        "share:Q",
        title=f"{COSTS[cost].unit}, share of the original",
        axis=alt.Axis(format="%"),
        scale=alt.Scale(zero=False),
    )
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True, color=COLOURS[DEPTHWISE])
        .encode(x=x, y=alt.Y(f"{key}:Q", title=title), tooltip=[alt.Tooltip("share:Q", format=".1%"), f"{key}:Q"])
    )
    if macs_share is not None and cost == "macs":
        chart += alt.Chart(alt.Data(values=[{"share": macs_share}])).mark_rule(strokeDash=[4, 4]).encode(x="share:Q")
    return _sized(chart, "Error-cost frontier", FRONTIER_BARS)


def _cost_of(frontier: Sequence[Mapping[str, Any]]) -> str:
    """The cost to draw a frontier over: a measured one where every point has it, else the first of `COSTS`."""
    names = [name for name in COSTS if all(name in point["shares"] for point in frontier)]
    return max(names, key=lambda name: COSTS[name].is_measured)


def _layer_axis(alt: Any, order: Sequence[str]) -> Any:
    return alt.Y("layer:N", sort=order, title=None, axis=alt.Axis(labelLimit=160))


def _colours(alt: Any) -> Any:
    scale = alt.Scale(domain=list(COLOURS), range=list(COLOURS.values()))
    return alt.Color("outcome:N", scale=scale, legend=alt.Legend(orient="top", title=None, columns=2))


def _sized(chart: Any, description: str, bars: int) -> dict[str, Any]:
    """The chart as a dict, as wide as its container and as high as its bars take."""
    sized = chart.properties(width="container", height=BAR_PIXELS * max(MIN_BARS, bars), description=description)
    spec: dict[str, Any] = (
        sized.configure_view(stroke=None).configure_axis(labelFontSize=11, titleFontSize=12).to_dict()
    )
    return spec
