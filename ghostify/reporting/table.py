"""The report of a conversion as a table for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from ghostify.reporting.outcome import describe_outcome, describe_outputs
from ghostify.summary import LayerReport, Report
from ghostify.text import format_count, format_shape, printable

MAX_NAME_WIDTH = 22


def report_table(report: Report, title: str = "") -> Table:
    """A row for each convolution, the model's MACs as a footer; forecast and measured error of the outputs and the
    report's notes as a caption."""
    caption = "\n".join((*describe_outputs(report), *report.notes))
    longest_name = max((len(layer.name) for layer in report.layers), default=0)
    has_errors = any(layer.fit_error is not None for layer in report.layers)
    table = Table(
        title=Text(printable(title)) if title else None,
        caption=Text(printable(caption)) if caption else None,
        box=box.SIMPLE_HEAD,
        show_footer=report.macs_before is not None,
        footer_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("layer", "model", overflow="fold", min_width=min(longest_name, MAX_NAME_WIDTH))
    for heading in ("filters", "output"):
        table.add_column(heading, no_wrap=True)
    for heading, total in (("MACs", report.macs_before), ("after", report.macs_after)):
        table.add_column(heading, format_count(total), justify="right", no_wrap=True)
    if has_errors:
        table.add_column("error", justify="right")
    table.add_column("intrinsic + ghosts, or skip reason", overflow="fold")
    for layer in report.layers:
        table.add_row(*(Text(printable(cell)) for cell in _cells(layer, has_errors)))
    return table


def _cells(layer: LayerReport, has_errors: bool) -> list[str]:
    error = layer.holdout_error if layer.holdout_error is not None else layer.fit_error
    return [
        layer.name,
        format_shape(layer.weight_shape),
        "" if layer.output_size is None else format_shape(layer.output_size),
        format_count(layer.macs_before),
        "" if layer.skip_reason is not None else format_count(layer.macs_after),
        *(["" if error is None else f"{error:.3f}"] if has_errors else []),
        describe_outcome(layer),
    ]
