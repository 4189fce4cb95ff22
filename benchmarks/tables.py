"""What every benchmark does with its rows: print them as they come, show the table, write the result file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ghostify.checkpoint import versions

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def publish(name: str, title: str, columns: dict[str, Callable[[Row], str]], rows: Iterable[Row], **facts: Any) -> None:
    """Show `rows` by `columns` (heading -> cell) and write them with `facts` and versions to results/`name`.json."""
    table, found = Table(title=title), []
    table.add_column("how")
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        found.append(row)
        cells = [cell(row) for cell in columns.values()]
        table.add_row(row["how"], *cells)
        print(row["how"], *cells, flush=True)
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    content = {**facts, "versions": versions(), "rows": found}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
