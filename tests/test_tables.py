"""Result files: the output of `publish`; committed files are small and equal to the catalogue's tables."""

import ast
import json
import sys

import pytest

from benchmarks.experiments import pages
from benchmarks.lib import tables
from benchmarks.lib.catalogue import CATALOGUE
from benchmarks.lib.cells import label, spread

BENCHMARKS = tables.ROOT / "benchmarks"


def test_a_result_is_written_as_table_and_as_json(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "experiments/paper.py"), "--some", "thing"])
    rows = [{"how": "auto and narrow", "share": 0.5}, {"how": "original"}]
    tables.publish("new", rows, {"share": lambda row: str(row.get("share", ""))}, seed=1)
    content = json.loads((tmp_path / "new.json").read_text())
    assert (content["command"], content["seed"]) == ("python benchmarks/experiments/paper.py --some thing", 1)
    assert content["rows"] == rows == tables.recorded("new")
    table = (tmp_path / "new.md").read_text()
    assert "| auto with pruning | 0.5 |\n| original |  |" in table
    assert content["command"] in table


def test_appended_rows_stand_beside_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "experiments/paper.py")])

    def append(*rows):
        tables.publish("new", rows, {"error": lambda row: f"{row['error']:g}"}, append=True)

    append({"how": "a", "error": 1}, {"how": "b", "error": 2})
    append({"how": "c", "error": 3}, {"how": "a", "error": 4})
    assert {row["how"]: row["error"] for row in tables.recorded("new")} == {"a": 4, "b": 2, "c": 3}
    append()
    assert len(tables.recorded("new")) == 3


def test_a_missing_result_has_no_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.recorded("new") == []


def test_a_result_without_columns_is_refused():
    with pytest.raises(AssertionError, match="no entry in the catalogue"):
        tables.publish("new", [])


def test_spread_of_one_value_is_the_value():
    assert (spread([1.0, None]), spread([1.0, 3.0]), spread([])) == ("1.00", "2.00 ± 1.00", "")


def test_labels_do_not_change_other_names():
    assert label("ghostify, auto") == "ghostify, auto"


def test_committed_tables_are_those_of_the_committed_rows():
    written = dict(pages.tables())
    assert {f.stem for f in tables.RESULTS.glob("*.md")} == written.keys()
    assert {name: (tables.RESULTS / f"{name}.md").read_text() for name in written} == written
    assert {f.stem for f in tables.RESULTS.glob("*.json")} - {"zoo"} <= CATALOGUE.keys()


def test_result_files_are_small_and_name_a_command_that_exists():
    for file in tables.RESULTS.iterdir():
        assert file.stat().st_size < 300_000, file.name
    for file in tables.RESULTS.glob("*.json"):
        script = json.loads(file.read_text())["command"].split()[1]
        assert (tables.ROOT / script).is_file(), file.name


def test_the_readme_lists_every_experiment_and_result():
    text = (BENCHMARKS / "README.md").read_text()
    scripts = [f.name for f in (BENCHMARKS / "experiments").glob("*.py") if f.name != "__init__.py"]
    assert [name for name in scripts if f"{name}" not in text] == []
    assert [f.stem for f in tables.RESULTS.glob("*.json") if f"`{f.stem}`" not in text] == []


def private_names(file):
    """Private names of ghostify's modules that a file imports or reads from one."""
    tree = ast.parse(file.read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("ghostify")]
    modules = {alias.asname or alias.name for n in imports for alias in n.names}
    yield from (alias.name for n in imports for alias in n.names if alias.name.startswith("_"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield from [node.attr] * (node.attr.startswith("_") and not node.attr.startswith("__"))


@pytest.mark.parametrize("file", sorted(BENCHMARKS.rglob("*.py")), ids=lambda f: f.stem)
def test_experiments_use_no_private_names_of_the_product(file):
    assert list(private_names(file)) == []
