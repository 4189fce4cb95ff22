"""Terminal output of the command: progress on standard error, tables and facts on standard output."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ghostify.fitting.driver import ProgressCallback
from ghostify.reporting.analysis import layer_costs
from ghostify.reporting.table import report_table
from ghostify.summary import Report

LAYERS_SHOWN = 3


def print_line(text: str) -> None:
    """Print a line without markup or highlighting."""
    Console().print(text, highlight=False, markup=False)


def print_deprecation(text: str) -> None:
    """Print a line on standard error, in the form of the command's errors."""
    print(f"ghostify: {text}", file=sys.stderr)


@contextlib.contextmanager
def progress_bar(title: str, is_quiet: bool) -> Iterator[ProgressCallback | None]:
    """A callback that updates a progress bar as long as the context lasts, or None where it is quiet."""
    if is_quiet:
        yield None
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


def show_report(report: Report, title: str, as_json: bool) -> None:
    """Print a report as a table with a summary, or as JSON."""
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
        return
    Console().print(report_table(report, title))
    print_line(f"{report.rewritten} convolutions rewritten, {len(report.layers) - report.rewritten} skipped")
    shares = [
        f"{c.layer.name} {c.error_share:.0%}"
        for c in layer_costs(report)[:LAYERS_SHOWN]
        if c.layer.output_error is not None
    ]
    if shares:
        print_line(f"largest shares of the predicted output error: {', '.join(shares)}")
    if report.missing_attributes:
        print_line(f"attributes of the original that are missing: {', '.join(report.missing_attributes)}")
    if (reconstruction := report.reconstruction) is not None:
        improved = sum(block.steps > 0 for block in reconstruction.blocks)
        errors = f"{reconstruction.error_before:.4f} -> {reconstruction.error_after:.4f}"
        print_line(f"{improved} of {len(reconstruction.blocks)} blocks reconstructed, output error on holdout {errors}")


def show_facts(facts: Mapping[str, Any], labels: Mapping[str, str], as_json: bool) -> None:
    """Print facts as JSON, or with their labels: by default the key with spaces."""
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    grid = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        grid.add_row(Text(labels.get(key, key.replace("_", " "))), Text(str(value)))
    Console().print(grid)
