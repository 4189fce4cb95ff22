"""A report as one self-contained HTML page."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from ghostify.io.atomic import write_text_atomic
from ghostify.io.output import writing_to
from ghostify.reporting.analysis import LatencyPairs, layer_costs, skipped_by_reason, suggestions
from ghostify.reporting.charts import error_chart, frontier_chart, layers_chart, require_altair
from ghostify.reporting.ghost_pictures import LayerPictures
from ghostify.reporting.outcome import describe_outcome, describe_outputs
from ghostify.summary import Report
from ghostify.text import format_count, format_shape

TEMPLATE = "report.html.j2"
LAYERS_LISTED = 5
HEAD_BYTES, TITLE_END = 2**16, b" - ghostify</title>"


@dataclass(frozen=True)
class TotalRow:
    """A row of the table of totals: before and after as they are shown, and after / before where it has a meaning."""

    quantity: str
    before: str
    after: str
    ratio: float | None = None


@dataclass(frozen=True)
class Page:
    """The content of a page; `latencies` are in ms, `frontier` holds the points of a curve as dicts."""

    title: str
    report: Report
    totals: Sequence[TotalRow] = ()
    latencies: LatencyPairs = field(default_factory=dict)
    pictures: Sequence[LayerPictures] = ()
    frontier: Sequence[Mapping[str, Any]] = ()


def write_page(page: Page, file: str | Path) -> Path:
    """Write the page as one file that needs no other file and no network.

    Raises `GhostifyError` where the libraries for charts are not installed, and for a file that cannot be written.
    """
    text = render(page)
    with writing_to(file):
        write_text_atomic(file, text)
    return Path(file)


def is_page(file: Path) -> bool:
    """Whether a file is a page of this version or an earlier one, by its first lines."""
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    return head.startswith(b"<!DOCTYPE html>") and TITLE_END in head


def render(page: Page) -> str:
    """The page's HTML."""
    require_altair()
    bundle: str = importlib.import_module("vl_convert").javascript_bundle()
    charts = _charts(page)
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            page=page,
            report=page.report,
            outputs=describe_outputs(page.report),
            skipped=skipped_by_reason(page.report),
            largest_errors=[cost for cost in layer_costs(page.report) if cost.error_share > 0][:LAYERS_LISTED],
            has_output_errors=any(layer.output_error is not None for layer in page.report.layers),
            suggestions=suggestions(page.report, page.latencies),
            charts=charts,
            specs=script_json(charts),
            bundle=Markup(bundle.replace("</script", "<\\/script")),
        )
    )


def script_json(data: object) -> Markup:
    """JSON that can stand within a script element, whatever its texts are."""
    return Markup(json.dumps(data).replace("<", "\\u003c"))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ghostify.reporting"),
        autoescape=select_autoescape(["html.j2", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=format_count, shape=format_shape, outcome=describe_outcome)
    return environment


def _charts(page: Page) -> dict[str, dict[str, Any]]:
    """The Vega-Lite specification of each chart, by the end of its element's id."""
    report = page.report
    charts = {"layers": layers_chart(report)}
    if any(layer.fit_error is not None or layer.holdout_error is not None for layer in report.layers):
        charts["errors"] = error_chart(report)
    if page.frontier:
        macs_share = report.macs_after / report.macs_before if report.macs_after and report.macs_before else None
        charts["frontier"] = frontier_chart(page.frontier, macs_share)
    return charts
