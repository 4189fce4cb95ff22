"""What the command shows on a terminal: progress on standard error, tables and facts on standard output."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ghostify.fitting.driver import ProgressCallback as Told
from ghostify.reporting.analysis import layer_costs
from ghostify.reporting.table import report_table
from ghostify.summary import Report

COSTLIEST = 3


def print_line(text: str) -> None:
    """A line, as it is."""
    Console().print(text, highlight=False, markup=False)


@contextlib.contextmanager
def progress(what: str, quiet: bool) -> Iterator[Told | None]:
    """A bar while the context lasts, or nothing."""
    if quiet:
        yield None
        return
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name)


def show_report(found: Report, title: str, as_json: bool) -> None:
    """The table of a report and what stands out in it, or its JSON."""
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
        return
    Console().print(report_table(found, title))
    print_line(f"{found.rewritten} convolutions rewritten, {len(found.layers) - found.rewritten} left as they are")
    worst = [
        f"{c.layer.name} {c.error_share:.0%}"
        for c in layer_costs(found)[:COSTLIEST]
        if c.layer.output_error is not None
    ]
    if worst:
        print_line(f"of the error to expect in the outputs, most from {', '.join(worst)}")
    if found.missing_attributes:
        print_line(f"without the original's {', '.join(found.missing_attributes)}")
    if (done := found.reconstruction) is not None:
        kept = sum(b.steps > 0 for b in done.blocks)
        errors = f"outputs' error on held-out images {done.error_before:.4f} -> {done.error_after:.4f}"
        print_line(f"{kept} of {len(done.blocks)} blocks reconstructed, {errors}")


def show_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """Names and values side by side, or as JSON."""
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    grid = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        grid.add_row(Text(key), Text(str(value)))
    Console().print(grid)
