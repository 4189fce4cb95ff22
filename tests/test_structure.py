"""The packages match the architecture and the design: order of imports, names, a row for every file."""

import ast
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

import ghostify

ROOT = Path(__file__).parent.parent
SOURCES, EXPLANATION = ROOT / "ghostify", ROOT / "docs/explanation"


@pytest.fixture(scope="module")
def architecture():
    """docs/draw_architecture.py as a module."""
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs/draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ordered_units():
    """Packages and single modules, in the order of the architecture page, without `/` and `.py`."""
    text = (EXPLANATION / "architecture.md").read_text()
    return [name.removesuffix(".py").removesuffix("/") for name in re.findall(r"^\d+\. `([\w./]+)`$", text, re.M)]


def test_imports_go_one_way(architecture):
    order, graph = ordered_units(), architecture.import_graph()
    assert sorted(order) == sorted(graph)
    against = [
        (unit, other) for unit, needs in graph.items() for other in needs if order.index(other) > order.index(unit)
    ]
    assert against == []


def test_the_picture_shows_the_imports(architecture):
    assert architecture.PICTURE.read_text() == architecture.drawing(), "run python docs/draw_architecture.py"


def test_only_implied_imports_are_omitted_from_the_picture(architecture):
    graph = {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": {"a"}}
    assert architecture.reduced(graph) == {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"a"}}
    assert architecture.levels(graph) == {"a": 0, "b": 1, "c": 2, "d": 1}


def test_every_import_of_the_package_is_read(architecture, tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import ghostify.data.sources\n"
        "from ghostify import plan, errors\n"
        "from ghostify.fitting import lstsq, patches\n"
        "from ghostify.errors import GhostifyError\n"
        "from torch import nn\n"
    )
    assert sorted({architecture.unit_of(name) for name in architecture.imported(file)}) == ["data", "errors", "fitting"]


def test_no_module_or_package_shadows_a_public_function():
    functions = {name for name in ghostify.__all__ if inspect.isfunction(getattr(ghostify, name))}
    assert functions & {path.stem for path in SOURCES.iterdir()} == set()


def files_in_design():
    """Paths of the files in the tables of the design page, by the package heading that they are under."""
    package = None
    for line in (EXPLANATION / "design.md").read_text().splitlines():
        if heading := re.match(r"### `([\w/]+)/`", line):
            package = Path() if heading[1] == "ghostify" else Path(heading[1])
        elif row := re.match(r"\| `([\w/]+\.py)` \|", line):
            yield package / row[1]


def test_the_design_has_a_row_for_every_file():
    files = [f.relative_to(SOURCES) for f in SOURCES.rglob("*.py") if not f.name.startswith("__")]
    assert sorted(files_in_design()) == sorted(files)


def test_every_module_has_a_docstring():
    assert [f for f in SOURCES.rglob("*.py") if not ast.get_docstring(ast.parse(f.read_text()))] == []
