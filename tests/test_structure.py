"""The rooms stand as the design says: imports between packages never run back."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "ghostify"
DESIGN = SOURCES.parent / "docs/explanation/design.md"


def room(module):
    """The package of a module, or the module itself where it lies above all."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (SOURCES / parts[1]).is_dir() else ".".join(parts[:2])


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ghostify":
            if node.module == "ghostify":
                yield from (f"ghostify.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_no_import_runs_back_between_packages():
    needs = {}
    for file in SOURCES.rglob("*.py"):
        own = room(".".join(("ghostify", *file.relative_to(SOURCES).with_suffix("").parts)))
        needs.setdefault(own, set()).update(room(name) for name in imported(file))
    for own, others in needs.items():
        others.discard(own)
    assert list(TopologicalSorter(needs).static_order())[-1] in ("ghostify.__main__", "ghostify.__init__")


def test_the_design_names_every_file():
    text = DESIGN.read_text()
    files = [f for f in SOURCES.rglob("*.py") if not f.name.startswith("__")]
    assert [f.name for f in files if f"| `{f.name}` |" not in text] == []
    assert [
        p.name for p in SOURCES.iterdir() if p.is_dir() and f"### `{p.name}/`" not in text and p.name[0] != "_"
    ] == []
    assert text.count(".py` |") == len(files)
