"""A short run of the fuzzer, and what its watch forbids; `make fuzz` is the long run."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.command import run_code
from tests.fuzz_folders import summary, table
from tests.fuzz_values import CODE
from tests.fuzz_watch import foreign_code

ROOT = Path(__file__).parents[1]


FUZZ = "import sys; from tests.fuzz_folders import main; sys.exit(main())"


def test_changed_folders_are_refused_or_only_compute(tmp_path):
    options = ("--count", 100, "--seed", 1, "--jobs", 1, "--samples", "residual,old-narrow")
    done = run_code(FUZZ, *options, "--output", tmp_path / "counts", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "counts").read_text())
    assert (counts["count"], counts["findings"]) == (100, 0)
    outcomes = Counter()
    for row in counts["counts"].values():
        outcomes.update(row)
    assert sum(outcomes.values()) == 100
    assert min(outcomes["refused"], outcomes["loaded"]) > 5


@pytest.mark.parametrize(
    "source",
    [
        f"def f(x={CODE}()): pass",
        f"x = 1\n{CODE}()",
        f"x = 1 # {CODE}",
        f"x.{CODE}",
        f"def f({CODE}",
        f"f'{{{CODE}}}' + {CODE}",
    ],
)
def test_code_of_a_folder_is_recognised(source):
    assert foreign_code(source) is not None
    assert foreign_code(source.encode()) is not None


@pytest.mark.parametrize("source", ["x = 1", f"x = '{CODE}()'", f"x_{CODE}_ = 1", None])
def test_texts_and_safe_names_are_no_code(source):
    assert foreign_code(source) is None


WATCHED = """
import contextlib, os, pathlib, subprocess, sys, tempfile
from tests.fuzz_watch import ForbiddenError, Watch
watch, folder = Watch(), pathlib.Path(tempfile.mkdtemp())
(folder / "a").write_text("1")
with watch.over(readable=folder):
    assert (folder / "a").read_text() == "1"
    compile("x = 1", "<text>", "exec")
for action in (
    lambda: os.system("true"),
    lambda: subprocess.run(["true"]),
    lambda: open("/etc/hostname"),
    lambda: open(folder / "b", "w"),
    lambda: os.mkdir(folder / "c"),
    lambda: exec("canarycode"),
    lambda: __import__("this"),
    lambda: __import__("socket").socket(),
    lambda: __import__("pickle").loads(b"cos\\nsystem\\n."),
):
    before = len(watch.events)
    try:
        with watch.over(readable=folder):
            action()
    except ForbiddenError:
        pass
    assert len(watch.events) == before + 1, action
with watch.over(readable=folder, writable=folder):
    (folder / "d").write_text("1")
"""


def test_the_watch_stops_what_it_forbids():
    done = run_code(WATCHED, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_table_has_sums_of_rows_and_columns():
    rows = [line.split() for line in table(Counter({("a", "x"): 2, ("a", "y"): 1, ("b", "y"): 4})).splitlines()]
    assert rows == [["change", "x", "y", "all"], ["a", "2", "1", "3"], ["b", "0", "4", "4"], ["all", "2", "5", "7"]]


def test_the_page_on_security_states_the_counts_of_the_stored_run():
    stored = json.loads((ROOT / "tests/data/fuzz-folders.json").read_text())
    assert stored["findings"] == 0
    page = " ".join((ROOT / "docs/security.md").read_text().split())
    assert f"{summary(stored)}." in page, summary(stored)
