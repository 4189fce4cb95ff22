"""The page of all results, docs/results.md, and the table of each, from the committed JSON files.

python benchmarks/experiments/pages.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.catalogue import CATALOGUE
from benchmarks.lib.cells import section
from benchmarks.lib.tables import FIGURES, RESULTS, ROOT, load_result, options

PAGE = ROOT / "docs/results.md"
HEAD = """# Results

Written by `python benchmarks/experiments/pages.py` from the files in `benchmarks/results/`. Each table names its
command; the docstring of that script tells the data, seeds, images and training. Speedups are ratios of interleaved
runs on one machine with two CPU cores, or on the GPU that is named. Comparison rows without milliseconds: most of seeds
1 and 2, and some of MobileNetV2's seed 0, were distilled on a GPU; in the files that end in -2 with torch 2.11.
"""


def tables() -> Iterator[tuple[str, str]]:
    """Name and section of every result that has been measured."""
    for name, (title, columns) in CATALOGUE.items():
        content = load_result(name)
        if content["rows"]:
            yield name, section(title, content, columns)


def page() -> str:
    """docs/results.md: all sections, each with its figure where there is one."""
    parts = [HEAD]
    for name, text in tables():
        figure = FIGURES / f"{name}.svg"
        shown = f"![{CATALOGUE[name][0]}]({figure.relative_to(PAGE.parent)})\n" if figure.exists() else ""
        parts.append("\n".join(filter(None, [text, shown])))
    return "\n".join(parts)


def main() -> None:
    options(__doc__).parse_args()
    for name, text in tables():
        (RESULTS / f"{name}.md").write_text(text)
    PAGE.write_text(page())
    print(PAGE)


if __name__ == "__main__":
    main()
