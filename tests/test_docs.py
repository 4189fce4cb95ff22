"""Every block of Python and of commands in README and docs runs as it stands, tiny networks and images in the place of
ResNet-18's and MobileNet's, and multiply-accumulates in the place of time, on which no two runs agree.

Blocks of a page share their names and one folder, in which there are weights and photographs. What cannot run here, as
it needs several machines or your own files, is marked as a console session.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import save_file
from typer.main import get_command

from benchmarks.experiments import pages
from ghostify.cli.commands import app
from tests.command import run_command
from tests.nets import settle

ROOT = Path(__file__).parent.parent
GENERATED = ("results.md", "zoo.md")
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name not in GENERATED)]
STAND_INS = {"resnet18": "test_resnet", "pretrained=True": "pretrained=False", "224, 224": "64, 64"}
STAND_INS |= {"mobilenetv2_050": "test_efficientnet", "8, 3, 96, 96": "8, 3, 64, 64"}
STAND_INS |= {'"latency": 0.95': '"macs": 0.95', "latency=0.95": "macs=0.95"}


def blocks(page):
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence" and "--8<--" not in token.content:
            yield token.info.split()[0] if token.info else "", token.content, token.map[0] + 1


def stood_in(text):
    for name, other in STAND_INS.items():
        text = text.replace(name, other)
    return text


def commands(text):
    """The words after `ghostify` of each line, split as a shell does."""
    for line in text.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "ghostify"
        yield words


@pytest.fixture
def folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_file(settle(timm.create_model("test_resnet")).state_dict(), tmp_path / "test_resnet.safetensors")
    draw = np.random.default_rng(0)
    for place in ("photos", "test"):
        for kind in ("cat", "dog"):
            (tmp_path / place / kind).mkdir(parents=True)
            for k in range(8):
                pixels = draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((160, 160), Image.Resampling.BICUBIC).save(
                    tmp_path / place / kind / f"{k}.png"
                )
    monkeypatch.setenv("COLUMNS", "200")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)  # as torchrun has it, of one process
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore:fit overfits the calibration images")
def test_blocks_run(page, folder):
    names = {"__name__": "block"}
    for kind, text, line in blocks(page):
        assert kind in ("python", "bash", "console", "toml", "text", "")
        if kind == "python":
            exec(compile("\n" * line + stood_in(text), page.name, "exec"), names)
        elif kind == "bash":
            for command in commands(stood_in(text)):
                done = run_command(*command, cwd=folder)
                assert done.returncode == 0, f"{page.name}, line {line}: {' '.join(command)}: {done.stderr}"


def test_the_readme_is_short_and_begins_with_code():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 700
    assert "```python" in "\n".join(text.split("\n")[:25])


def test_the_page_of_results_is_that_of_the_result_files():
    assert (ROOT / "docs/results.md").read_text() == pages.page()


def test_the_example_of_every_verb_is_among_the_blocks_that_run():
    shown = " ".join(" ".join(text.split()) for page in PAGES for kind, text, _ in blocks(page) if kind == "bash")
    for verb, command in get_command(app).commands.items():
        examples = [part.split("\n\n")[0] for part in (command.help or "").split("Example: ")[1:]]
        assert examples, verb
        missing = [e for e in examples if verb != "demo" and " ".join(e.split()) not in shown]
        assert missing == []


def test_public_names_are_all_in_the_reference():
    import ghostify

    text = (ROOT / "docs/reference.md").read_text()
    assert [name for name in ghostify.__all__ if f"::: ghostify.{name}\n" not in text] == []
    assert all(getattr(ghostify, name).__doc__ for name in ghostify.__all__)


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    shown = (tmp_path / "site/command/index.html").read_text()
    assert "ghostify finetune" in shown
    assert "Example: ghostify convert" in shown
