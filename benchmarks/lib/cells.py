"""Rows of a result, the cells of a table's columns, and the table in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Row = dict[str, Any]
Cells = Mapping[str, Callable[[Row], str]]
Summary = Callable[[list[Row]], str]
Columns = Cells | Summary

LABELS = {
    "auto and narrow": "auto with pruning",
    "ghost, first filters kept": "unfitted ghosts, first filters kept",
    "ghost, random": "unfitted ghosts, random",
    "channels, least squares": "channel pruning, least squares",
}


def label(name: str) -> str:
    """The label in tables and figures of `name` in a result file."""
    for recorded, shown in LABELS.items():
        name = name.replace(recorded, shown)
    return name


def number(key: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    """Cells with a number; empty where a row has none."""
    return lambda row: "" if row.get(key) is None else f"{scale * row[key]:.{digits}f}"


def by_kernel_size(key: str, form: str) -> Callable[[Row], str]:
    """Cells with one number for each kernel size."""
    return lambda row: " / ".join(form.format(row[key][d]) for d in ("1", "3", "5", "7"))


def spread(values: Iterable[float | None]) -> str:
    """Mean and standard deviation of the values that are present; of one value itself."""
    present = [v for v in values if v is not None]
    if len(present) < 2:
        return "".join(f"{v:.2f}" for v in present)
    return f"{statistics.mean(present):.2f} ± {statistics.pstdev(present):.2f}"


def table(rows: list[Row], columns: Columns) -> str:
    """The rows as a table in Markdown."""
    if not isinstance(columns, Mapping):
        return columns(rows)
    head = ["", *columns]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join([label(row["how"]), *(cell(row) for cell in columns.values())]) + " |" for row in rows]
    return "\n".join(lines)


def section(title: str, content: Row, columns: Columns) -> str:
    """A heading, the command and the table of a result's content."""
    return f"## {title}\n\n`{content['command']}`\n\n{table(content['rows'], columns)}\n"
