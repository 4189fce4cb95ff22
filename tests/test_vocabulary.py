"""Sources, templates, README and docs use one vocabulary: former words of the project do not come back."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXEMPT = {ROOT / "ghostify/io/format1.py"}
PATTERNS = ("ghostify/**/*.py", "ghostify/**/*.j2", "docs/**/*.md", "README.md")
WORDS = (
    "anew",
    "at the least",
    "bears?",
    "behind",
    "by turns",
    "dense_prediction|dense prediction",
    "exhibits?",
    "feels?",
    "felt",
    "foretell|foretells|foretold",
    "goes? along|going along",
    "held_out",
    "in earnest",
    "is no (?!longer|more|less)[a-z]+",
    "judge|judges|judged|judging",
    "left alone|leave alone",
    "lessons?",
    "make good|makes good|made good",
    "mends?|mended",
    "narrowed|narrowing|narrowings",
    "nobody|somebody|whoever",
    "norm_behind",
    "out of reach",
    "parted",
    "promises?|promised",
    "shelf|shelves",
    "sights?",
    "sketch|sketches",
    "speaks? of",
    "stretch|stretches",
    "takes? up (?!to)|taken up|taking up|took up",
    "thinned|thinning|thinnings",
    "verdicts?",
    "walks?",
    "whence",
    "wiring",
    "wish|wishes|wished",
)
NAMES = (
    "asked", "both", "clock", "found", "held", "judged", "keeps", "link", "links", "made", "makes", "one",
    "own", "partner", "places", "reads", "seen", "spent", "taken", "taught", "tell", "told", "twins",
)  # fmt: skip


def texts():
    """The files in which the words are banned, with their texts."""
    for pattern in PATTERNS:
        for file in sorted(set(ROOT.glob(pattern)) - EXEMPT):
            yield file, file.read_text()


def identifiers(source):
    """Names of the variables, parameters and functions that Python code defines, with their lines."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                yield name, node.lineno


def uses_of(word, text):
    """Lines with a word, also as a part of a name in snake case; "there is no" is allowed, and aliases in quotes."""
    pattern = re.compile(rf'(?<![A-Za-z"])(?<!there )({word})(?![A-Za-z"])', re.I)
    return [number for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)]


@pytest.mark.parametrize("word", WORDS)
def test_former_words_do_not_occur(word):
    uses = [f"{file.relative_to(ROOT)}:{line}" for file, text in texts() for line in uses_of(word, text)]
    assert uses == []


@pytest.mark.parametrize("name", NAMES)
def test_variables_are_not_called_by_former_names(name):
    sources = ((file, text) for file, text in texts() if file.suffix == ".py")
    uses = [f"{file.relative_to(ROOT)}:{line}" for file, text in sources for n, line in identifiers(text) if n == name]
    assert uses == []


@pytest.mark.parametrize("text", ["It is no file", "felt = 1", "its_felt_sum", "Norms behind it, and walks"])
def test_uses_are_recognised(text):
    assert any(uses_of(word, text) for word in WORDS)


@pytest.mark.parametrize("text", ["there is no file", "is no longer", '"lessons": "load_training_data"', "insight"])
def test_other_uses_are_allowed(text):
    assert not any(uses_of(word, text) for word in WORDS)


def test_identifiers_are_those_that_code_defines():
    source = "def f(a, *, b):\n    c = d.e\n    for g in c:\n        yield g\n"
    assert sorted(identifiers(source)) == [("a", 1), ("b", 1), ("c", 2), ("f", 1), ("g", 3)]
