"""Options, printed rows and result files of the experiments."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.lib.catalogue import CATALOGUE
from benchmarks.lib.cells import Columns, Row, section
from ghostify.io.atomic import write_text_atomic
from ghostify.io.checkpoint import versions

ROOT = Path(__file__).parents[2]
RESULTS, FIGURES = ROOT / "benchmarks/results", ROOT / "docs/images"


def options(description: str | None, quick: str | None = None) -> argparse.ArgumentParser:
    """A parser that shows the experiment's docstring; with --quick where `quick` says what that means."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def load_result(name: str) -> dict[str, Any]:
    """The content of results/`name`.json; without rows if there is no such file."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {"rows": []}


def recorded(name: str) -> list[Row]:
    """The rows of results/`name`.json, for an experiment that resumes after an interruption."""
    return load_result(name)["rows"]


def publish(
    name: str, rows: Iterable[Row], columns: Columns | None = None, *, append: bool = False, **facts: Any
) -> None:
    """Print each row once it is measured, and keep results/`name`.json and results/`name`.md up to date.

    The JSON file holds the rows, `facts`, the command and the versions. The table has the columns of the catalogue's
    entry `name`, or `columns` where it has none. With `append`, the rows that the file has already stay, those of
    another process too; a row replaces one that has its name.
    """
    if name not in CATALOGUE:
        assert columns is not None, f"{name} has no entry in the catalogue"
    title, columns = CATALOGUE.get(name, (name, columns))
    RESULTS.mkdir(exist_ok=True)
    written: list[Row] = []
    for row in rows:
        before = [r for r in recorded(name) if r["how"] != row["how"]] if append else written
        written = [*before, row]
        content = {"command": _command(), **facts, "versions": versions(), "rows": written}
        write_text_atomic(RESULTS / f"{name}.json", json.dumps(content, indent=1) + "\n")
        write_text_atomic(RESULTS / f"{name}.md", section(title, content, columns))
        cells = [f"{key} {cell(row)}" for key, cell in columns.items()] if isinstance(columns, dict) else [str(row)]
        print(f"{row['how']}: {', '.join(cells)}", flush=True)
    print(RESULTS / f"{name}.md")


def _command() -> str:
    script = Path(sys.argv[0]).resolve()
    return shlex.join(["python", str(script.relative_to(ROOT)), *sys.argv[1:]])
