"""Terminal output of the command: progress on standard error, tables and facts on standard output."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ghostify.fitting.driver import ProgressCallback
from ghostify.reporting.analysis import layer_costs
from ghostify.reporting.table import report_table
from ghostify.summary import Report
from ghostify.text import one_line, printable

LAYERS_SHOWN = 3


def print_line(text: str) -> None:
    """Print a line as it is; where it is a terminal's, wrapped at its width."""
    Console().print(Text(printable(text)))


def print_table(table: Table) -> None:
    """Print a table whose title and cells are `rich.text.Text`, or text without brackets."""
    Console().print(table)


@contextlib.contextmanager
def progress_bar(title: str, is_quiet: bool) -> Iterator[ProgressCallback | None]:
    """A callback that updates a progress bar as long as the context lasts; None where it is quiet, or no terminal."""
    console = Console(stderr=True)
    if is_quiet or not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=one_line(text))


def show_report(report: Report, title: str, as_json: bool) -> None:
    """Print a report as a table with a summary, or as JSON."""
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
        return
    print_table(report_table(report, title))
    print_line(f"{report.rewritten} convolutions rewritten, {len(report.layers) - report.rewritten} skipped")
    shares = [
        f"{cost.layer.name} {cost.error_share:.0%}"
        for cost in layer_costs(report)[:LAYERS_SHOWN]
        if cost.layer.output_error is not None
    ]
    if shares:
        print_line(f"largest shares of the predicted output error: {', '.join(shares)}")
    if report.missing_attributes:
        print_line(f"attributes of the original that are missing: {', '.join(report.missing_attributes)}")
    if (reconstruction := report.reconstruction) is not None:
        improved = sum(block.steps > 0 for block in reconstruction.blocks)
        errors = f"{reconstruction.error_before:.4f} -> {reconstruction.error_after:.4f}"
        print_line(f"{improved} of {len(reconstruction.blocks)} blocks reconstructed, output error on holdout {errors}")
    if (healing := report.healing) is not None:
        errors = f"{healing.error_before:.4f} -> {healing.error_after:.4f}"
        print_line(f"healed in {healing.steps} steps, {healing.seconds:.0f} s: output error on holdout {errors}")


def show_facts(facts: Mapping[str, str | int | float], labels: Mapping[str, str], as_json: bool) -> None:
    """Print facts as JSON, or with their labels: by default the key with spaces."""
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    grid = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        grid.add_row(Text(labels.get(key, key.replace("_", " "))), Text(printable(str(value))))
    print_table(grid)
