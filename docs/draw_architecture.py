"""Draw the packages of ghostify in the order of their imports, as docs/images/architecture.svg.

    python docs/draw_architecture.py

Reads the import statements of the sources and the first line of each package's docstring; nothing is imported. A
package is drawn above all that it imports. An arrow is omitted where other arrows imply it.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from functools import cache
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES, PICTURE = ROOT / "ghostify", ROOT / "docs/images/architecture.svg"
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 270, 52, 30, 26, 10
STYLE = """
  text { font-family: sans-serif; font-size: 11px; fill: #444444 }
  .name { font-size: 14px; font-weight: bold; fill: #0b4f6c }
  rect { fill: #eef6fa; stroke: #0b6e99 }
  path { fill: none; stroke: #8aa4b0 }
"""
Graph = dict[str, set[str]]


def unit_of(module: str) -> str:
    """The package in ghostify that contains a module, or the module itself if it is at the top level."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imported(file: Path) -> Iterator[str]:
    """Dotted names of the modules of ghostify that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "ghostify")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ghostify":
            submodules = [alias.name for alias in node.names if is_module(f"{node.module}.{alias.name}")]
            yield from (f"{node.module}.{name}" for name in submodules) if submodules else (str(node.module),)


def is_module(name: str) -> bool:
    """Whether a dotted name is a module or package of the sources."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def import_graph() -> Graph:
    """Packages and top-level modules with their imports of each other, without `__init__` and `__main__`."""
    graph: Graph = {}
    for file in sorted(SOURCES.rglob("*.py")):
        parts = file.relative_to(SOURCES).with_suffix("").parts
        if len(parts) > 1 or not parts[0].startswith("__"):
            graph.setdefault(parts[0], set()).update(unit_of(name) for name in imported(file))
    return {unit: needs - {unit, "ghostify"} for unit, needs in graph.items()}


def reduced(graph: Graph) -> Graph:
    """The imports that no path of other imports implies."""

    @cache
    def reachable(unit: str) -> frozenset[str]:
        return frozenset(graph[unit]).union(*(reachable(other) for other in graph[unit]))

    return {u: {v for v in needs if not any(v in reachable(w) for w in needs - {v})} for u, needs in graph.items()}


def levels(graph: Graph) -> dict[str, int]:
    """0 for a package without imports, else one more than the highest level of its imports."""

    @cache
    def level(unit: str) -> int:
        return 1 + max((level(other) for other in graph[unit]), default=-1)

    return {unit: level(unit) for unit in graph}


def columns(graph: Graph, level: dict[str, int]) -> dict[str, int]:
    """Column 0 for the longest chain of imports, for others the first column in which their arrows cross no box."""
    users = {unit: [u for u, needs in graph.items() if unit in needs] for unit in graph}
    column: dict[str, int] = {}
    unit = max(graph, key=lambda u: level[u])
    while unit not in column:
        column[unit] = 0
        unit = max(sorted(graph[unit]), key=lambda u: level[u], default=unit)
    occupied: dict[int, list[tuple[int, int]]] = {}
    for unit in sorted(graph.keys() - column.keys(), key=lambda u: (level[u], u)):
        low = min([level[unit], *(level[u] + 1 for u in graph[unit])])
        high = max([low, *(level[u] - 1 for u in users[unit])])
        free = (k for k in range(1, len(graph)) if all(b < low or high < a for a, b in occupied.get(k, [])))
        column[unit] = next(free)
        occupied.setdefault(column[unit], []).append((low, high))
    return column


def first_line(unit: str) -> str:
    """The first line of the docstring of a package or module."""
    file = SOURCES / unit / "__init__.py" if (SOURCES / unit).is_dir() else SOURCES / f"{unit}.py"
    return (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]


def drawing() -> str:
    """The picture as SVG."""
    graph = reduced(import_graph())
    level = levels(graph)
    column, top = columns(graph, level), max(level.values())

    def corner(unit: str) -> tuple[int, int]:
        return MARGIN + column[unit] * (WIDTH + GAP_X), MARGIN + (top - level[unit]) * (HEIGHT + GAP_Y)

    width = 2 * MARGIN + (max(column.values()) + 1) * (WIDTH + GAP_X) - GAP_X
    height = 2 * MARGIN + (top + 1) * (HEIGHT + GAP_Y) - GAP_Y
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">']
    lines += [f"<style>{STYLE}</style>", f'<rect width="{width}" height="{height}" style="fill:white;stroke:none"/>']
    for unit, needs in sorted(graph.items()):
        lines += [arrow(corner(unit), corner(other)) for other in sorted(needs)]
    for unit in sorted(graph):
        lines += box(unit, *corner(unit))
    return "\n".join([*lines, "</svg>"]) + "\n"


def arrow(upper: tuple[int, int], lower: tuple[int, int]) -> str:
    """An arrow from a box down to one that it imports: vertical in the outer column, curved next to the other."""
    x, y, u, v = upper[0] + WIDTH // 2, upper[1] + HEIGHT, lower[0] + WIDTH // 2, lower[1]
    turn = y if u > x else v - GAP_Y
    bend = f"L{x} {turn} C{x} {turn + GAP_Y} {u} {turn} {u} {turn + GAP_Y}"
    return f'<path d="M{x} {y} {bend} L{u} {v} m-4 -7 l4 7 l4 -7"/>'


def box(unit: str, x: int, y: int) -> list[str]:
    """A package with the first line of its docstring."""
    kind = "/" if (SOURCES / unit).is_dir() else ".py"
    words = textwrap.wrap(first_line(unit).replace("`", ""), 46, max_lines=2, placeholder=" ...")
    lines = [f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>']
    lines.append(f'<text class="name" x="{x + 10}" y="{y + 18}">{unit}{kind}</text>')
    return lines + [f'<text x="{x + 10}" y="{y + 32 + 13 * k}">{escape(w)}</text>' for k, w in enumerate(words)]


if __name__ == "__main__":
    PICTURE.write_text(drawing())
    print(PICTURE)
