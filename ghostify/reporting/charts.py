"""A report's charts, as Vega-Lite by Altair: plain data in, plain data out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from ghostify.errors import GhostifyError
from ghostify.reporting.analysis import layer_costs
from ghostify.reporting.outcome import DEPTHWISE, PRUNED, SKIPPED, WIDER, outcome_of
from ghostify.summary import Report

COLOURS = {SKIPPED: "#9a9a9a", DEPTHWISE: "#0b6e99", WIDER: "#b45309", PRUNED: "#6d28d9"}
STEP = 15
COSTLIEST = 15


def altair() -> Any:
    """The library, or what to do where it is missing."""
    try:
        return importlib.import_module("altair")
    except ImportError as error:
        raise GhostifyError("a page needs altair and vl-convert: pip install 'ghostify[report]'") from error


def layers_chart(found: Report) -> dict[str, Any]:
    """A bar of multiply-accumulates for each convolution before, and in front of it one after, by what happened."""
    alt = altair()
    rows = [
        {
            "layer": x.name,
            "before": x.macs_before,
            "after": x.macs_after,
            "what": outcome_of(x),
            "why": x.skip_reason or "",
        }
        for x in found.layers
    ]
    order = [x.name for x in found.layers]
    y = alt.Y("layer:N", sort=order, title=None, axis=alt.Axis(labelLimit=160))
    base = alt.Chart(alt.Data(values=rows)).encode(y=y)
    tips = [alt.Tooltip(f"{key}:{kind}") for key, kind in (("layer", "N"), ("what", "N"), ("why", "N"))]
    counts = [alt.Tooltip(f"{key}:Q", format=".3s") for key in ("before", "after")]
    before = base.mark_bar(color="#dddddd").encode(
        x=alt.X("before:Q", title="multiply-accumulates", axis=alt.Axis(format="~s", tickCount=4))
    )
    after = base.mark_bar(height={"band": 0.6}).encode(x="after:Q", color=_colours(alt), tooltip=[*tips, *counts])
    return _finished(before + after, "Multiply-accumulates of every convolution, before (light) and after", len(rows))


def error_chart(found: Report) -> dict[str, Any]:
    """A bar for each of the costliest layers: its share of the error to expect in the outputs."""
    alt = altair()
    rows = [
        {"layer": c.line.name, "share": c.error_share, "saved": c.saved_share, "what": outcome_of(c.line)}
        for c in layer_costs(found)[:COSTLIEST]
    ]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            y=alt.Y("layer:N", sort=[r["layer"] for r in rows], title=None, axis=alt.Axis(labelLimit=160)),
            x=alt.X("share:Q", title="share of the expected error", axis=alt.Axis(format="%", tickCount=4)),
            color=_colours(alt),
            tooltip=["layer:N", alt.Tooltip("share:Q", format=".1%"), alt.Tooltip("saved:Q", format=".1%")],
        )
    )
    return _finished(chart, "Where the error comes from", len(rows))


def frontier_chart(curve: Sequence[Mapping[str, Any]], chosen: float | None) -> dict[str, Any]:
    """Drop, or expected error where nothing was evaluated, by the share of the cost; a rule where this model is."""
    alt = altair()
    key = next(iter(k for k in ("latency", "macs") if all(k in p["shares"] for p in curve)))
    measured = all(p.get("drop") is not None for p in curve)
    value, title = ("drop", "points lost") if measured else ("error", "expected error of the outputs")
    rows = [{"share": p["shares"][key], "value": p[value], "macs": p["shares"]["macs"]} for p in curve]
    x = alt.X("share:Q", title=f"{key}, of the original's", axis=alt.Axis(format="%"), scale=alt.Scale(zero=False))
    line = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True, color="#0b6e99")
        .encode(x=x, y=alt.Y("value:Q", title=title), tooltip=[alt.Tooltip("share:Q", format=".1%"), "value:Q"])
    )
    if chosen is not None and key == "macs":
        line += alt.Chart(alt.Data(values=[{"share": chosen}])).mark_rule(strokeDash=[4, 4]).encode(x="share:Q")
    return _finished(line, "What can be had for which price", 16)


def _colours(alt: Any) -> Any:
    scale = alt.Scale(domain=list(COLOURS), range=list(COLOURS.values()))
    return alt.Color("what:N", scale=scale, legend=alt.Legend(orient="top", title=None, columns=2))


def _finished(chart: Any, title: str, steps: int) -> dict[str, Any]:
    sized = chart.properties(width="container", height=STEP * max(4, steps), description=title)
    made: dict[str, Any] = (
        sized.configure_view(stroke=None).configure_axis(labelFontSize=11, titleFontSize=12).to_dict()
    )
    return made
