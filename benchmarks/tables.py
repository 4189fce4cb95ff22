"""What every benchmark does: read its options, print rows as they come, show the table, write the result file."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ghostify.storing.checkpoint import versions

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def options(description: str | None, quick: str | None = None) -> argparse.ArgumentParser:
    """A parser that shows the benchmark's own text; with --quick where it says what that means."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def recorded(name: str) -> list[Row]:
    """The rows of results/`name`.json, if there is one, for a benchmark that goes on where it ended."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []


def spread(values: Iterable[float | None]) -> str:
    """Mean and standard deviation of the values that are there, of one value itself."""
    there = [v for v in values if v is not None]
    if len(there) < 2:
        return "".join(f"{v:.2f}" for v in there)
    return f"{statistics.mean(there):.2f} ± {statistics.pstdev(there):.2f}"


def publish(name: str, title: str, columns: dict[str, Callable[[Row], str]], rows: Iterable[Row], **facts: Any) -> None:
    """Show `rows` by `columns` (heading -> cell); write them, `facts`, command and versions to results/`name`.json."""
    table, found = Table(title=title), []
    table.add_column("how")
    for heading in columns:
        table.add_column(heading, justify="right")
    RESULTS.mkdir(exist_ok=True)
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    content = {"command": command, **facts, "versions": versions(), "rows": found}
    for row in rows:
        found.append(row)
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        cells = [cell(row) for cell in columns.values()]
        table.add_row(row["how"], *cells)
        print(row["how"], *cells, flush=True)
    Console().print(table)
