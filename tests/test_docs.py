"""Every block of Python and of commands in README and docs runs.

Tiny networks and images replace ResNet-18 and MobileNet, and multiply-accumulates replace latencies, which differ from
run to run. The blocks of a page share their names and a folder with weights and photographs. Blocks that need several
machines or the user's files are marked as console sessions and do not run.
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
REPLACEMENTS = {"resnet18": "tiny_resnet", "pretrained=True": "pretrained=False", "224, 224": "64, 64"}
REPLACEMENTS |= {"weights_backbone=None)": "weights_backbone=None, num_classes=3)"}
REPLACEMENTS |= {"mobilenetv2_050": "test_efficientnet", "8, 3, 96, 96": "8, 3, 64, 64"}
REPLACEMENTS |= {'"latency": 0.95': '"macs": 0.95', "latency=0.95": "macs=0.95"}


def blocks(page):
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence" and "--8<--" not in token.content:
            yield token.info.split()[0] if token.info else "", token.content, token.map[0] + 1


def with_replacements(text):
    for name, other in REPLACEMENTS.items():
        text = text.replace(name, other)
    return text


def commands(text):
    """The arguments of `ghostify` in each line, split as by a shell."""
    for line in text.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "ghostify"
        yield arguments


@pytest.fixture
def folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_file(settle(timm.create_model("tiny_resnet")).state_dict(), tmp_path / "tiny_resnet.safetensors")
    draw = np.random.default_rng(0)
    for dataset in ("photos", "test"):
        for name in ("cat", "dog"):
            (tmp_path / dataset / name).mkdir(parents=True)
            for k in range(8):
                pixels = draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((72, 72), Image.Resampling.BICUBIC).save(
                    tmp_path / dataset / name / f"{k}.png"
                )
    monkeypatch.setenv("COLUMNS", "200")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)  # as by torchrun with one process
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore:fit overfits the calibration images")
def test_blocks_run(page, folder):
    names = {"__name__": "block"}
    for kind, text, line in blocks(page):
        assert kind in ("python", "bash", "console", "toml", "text", "")
        if kind == "python":
            exec(compile("\n" * line + with_replacements(text), page.name, "exec"), names)
        elif kind == "bash":
            for command in commands(with_replacements(text)):
                result = run_command(*command, cwd=folder)
                assert result.returncode == 0, f"{page.name}, line {line}: {' '.join(command)}: {result.stderr}"


def test_the_readme_is_short_and_begins_with_code():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 700
    assert "```python" in "\n".join(text.split("\n")[:25])


def test_the_results_page_matches_the_result_files():
    assert (ROOT / "docs/results.md").read_text() == pages.page()


def test_the_example_of_every_command_is_among_the_blocks():
    shown = " ".join(" ".join(text.split()) for page in PAGES for kind, text, _ in blocks(page) if kind == "bash")
    for name, command in get_command(app).commands.items():
        examples = [part.split("\n\n")[0] for part in (command.help or "").split("Example: ")[1:]]
        assert examples, name
        missing = [e for e in examples if name != "demo" and " ".join(e.split()) not in shown]
        assert missing == []


def test_public_names_are_all_in_the_reference():
    import ghostify

    text = (ROOT / "docs/reference.md").read_text()
    assert [name for name in ghostify.__all__ if f"::: ghostify.{name}\n" not in text] == []
    assert all(getattr(ghostify, name).__doc__ for name in ghostify.__all__)


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert result.returncode == 0, result.stderr
    shown = (tmp_path / "site/command/index.html").read_text()
    assert "ghostify finetune" in shown
    assert "Example: ghostify convert" in shown
