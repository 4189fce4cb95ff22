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
from ghostify.reporting.analysis import Times, layer_costs, skipped_by_reason, suggestions
from ghostify.reporting.charts import altair, error_chart, frontier_chart, layers_chart
from ghostify.reporting.ghost_pictures import LayerPictures
from ghostify.reporting.outcome import describe_outcome
from ghostify.summary import Report
from ghostify.text import format_count, format_shape

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class TotalRow:
    """A line of the table of totals; before and after are as they are shown, `share` after / before where it says
    something."""

    what: str
    before: str
    after: str
    share: float | None = None


@dataclass(frozen=True)
class Page:
    """All that a page shows: the report, totals, each layer's milliseconds before and after, pictures, and a curve."""

    title: str
    report: Report
    totals: Sequence[TotalRow] = ()
    times: Times = field(default_factory=dict)
    pictures: Sequence[LayerPictures] = ()
    frontier: Sequence[Mapping[str, Any]] = ()


def write_page(page: Page, file: str | Path) -> Path:
    """Write the page; one file that needs no other and no network. Raises `GhostifyError` without its libraries."""
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(target, render(page))
    return target


def render(page: Page) -> str:
    """The page's HTML."""
    altair()
    bundle: str = importlib.import_module("vl_convert").javascript_bundle()
    found = page.report
    charts = {"layers": layers_chart(found)}
    if any(line.fit_error is not None or line.holdout_error is not None for line in found.layers):
        charts["costs"] = error_chart(found)
    if page.frontier:
        share = found.macs_after / found.macs_before if found.macs_after and found.macs_before else None
        charts["frontier"] = frontier_chart(page.frontier, share)
    environment = Environment(
        loader=PackageLoader("ghostify.reporting"),
        autoescape=select_autoescape(["html.j2", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = format_count
    return environment.get_template(TEMPLATE).render(
        page=page,
        report=found,
        describe_outcome=describe_outcome,
        format_shape=format_shape,
        left=skipped_by_reason(found),
        costly=[c for c in layer_costs(found) if c.error_share > 0][:5],
        felt=any(line.output_error is not None for line in found.layers),
        advice=suggestions(found, page.times),
        specs=Markup(json.dumps(charts).replace("</", "<\\/")),
        charts=charts,
        bundle=Markup(bundle.replace("</script", "<\\/script")),
    )
