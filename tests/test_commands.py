"""Every command in its own process, and the errors of the commands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ghostify
from ghostify import load
from ghostify.runtimes.registry import EXPORT_FORMATS, RUNTIMES
from tests import nets
from tests.command import run_code, run_command

ROOT = Path(__file__).parent.parent
NET = "tests.nets:Straight"
SIZE = ("--input-size", "3,12,12")
CONSOLE_SCRIPT = "import sys; sys.path.pop(0); from ghostify.cli.commands import main; main()"


def run(*arguments, cwd=ROOT):
    return run_command(*arguments, cwd=cwd)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    model = nets.settle(nets.Straight())
    save_file(model.state_dict(), folder / "w.safetensors")
    x = nets.images(24)
    np.savez(folder / "data.npz", images=x.numpy(), labels=model(x).argmax(1).numpy())
    return folder


def test_plan_needs_no_weights():
    process = run("plan", "timm:resnet10t", "--ratio", 2)
    assert process.returncode == 0, process.stderr
    assert "layer1.0.conv1" in process.stdout
    assert "first convolution" in " ".join(process.stdout.replace("│", " ").split())
    assert all(len(line) <= 80 for line in process.stdout.splitlines())  # no terminal: as in a log file
    assert "\x1b" not in process.stdout
    machine = run("plan", NET, *SIZE, "--json")
    assert json.loads(machine.stdout)["macs_after"] < json.loads(machine.stdout)["macs_before"]


def test_convert_then_finetune(files, tmp_path):
    out, tuned, data = tmp_path / "out", tmp_path / "tuned", files / "data.npz"
    weights = files / "w.safetensors"
    process = run("convert", NET, *SIZE, "--checkpoint", weights, "--output", out)
    assert process.returncode == 0, process.stderr
    command = ("finetune", out, "--data", data, "--original", weights, "--output", tuned, "--batch", 8, "--allow", NET)
    process = run(*command, "--epochs", 4, "--set", "labels=0.5", "--set", "save_every=3")
    assert process.returncode == 0, process.stderr
    assert "step 8: top-1" in process.stdout
    assert run("eval", tuned, "--data", data, "--original", weights, "--allow", NET).returncode == 0
    changed = run(*command, "--epochs", 2)
    assert changed.returncode == 2
    assert "belongs to a run with different epochs" in changed.stderr
    for wrong, said in (("depth=3", "unknown training setting"), ("precision=int8", "precision 'int8'")):
        refused = run(*command, "--set", wrong)
        assert refused.returncode == 2
        assert said in refused.stderr


def test_plan_writes_the_frontier(files, tmp_path):
    data = files / "data.npz"
    options = ("--checkpoint", files / "w.safetensors", "--calibration", data, "--validation", data, "--points", 3)
    process = run("plan", NET, *SIZE, *options, "--cheap", "auto", "--frontier", tmp_path / "f.json")
    assert process.returncode == 0, process.stderr
    assert "predicted error" in process.stdout
    curve = json.loads((tmp_path / "f.json").read_text())["points"]
    assert [p["shares"]["macs"] for p in curve] == sorted((p["shares"]["macs"] for p in curve), reverse=True)
    assert curve[0]["drop"] == 0
    assert set(curve[2]["layers"]) == {"a.0", "b.0"}


def test_convert_keeps_within_a_drop(files, tmp_path):
    data = files / "data.npz"
    options = ("--checkpoint", files / "w.safetensors", "--calibration", data, "--output", tmp_path / "out")
    limit = ("--cheap", "auto", "--budget", "max_drop=10")
    process = run("convert", NET, *SIZE, *options, *limit, "--validation", data, "--json")
    assert process.returncode == 0, process.stderr
    summary = json.loads(process.stdout)
    assert summary["macs_after"] < summary["macs_before"]
    refused = run("convert", NET, *SIZE, *options, *limit)
    assert refused.returncode == 2
    assert "Pass evaluate (--validation FOLDER)" in refused.stderr


def test_convert_then_eval(files, tmp_path):
    process = run(
        "convert", NET, *SIZE, "--checkpoint", files / "w.safetensors", "--calibration", files / "data.npz",
        "--output", tmp_path / "out", "--batch", 6, "--reconstruct",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "fitted to 24 images" in " ".join(process.stdout.split())
    assert "2 convolutions rewritten, 1 skipped" in process.stdout
    assert "of 1 blocks reconstructed, output error on holdout" in " ".join(process.stdout.split())
    assert load(tmp_path / "out")(torch.zeros(2, 3, 12, 12)).shape == (2, 5)
    command = ("eval", tmp_path / "out", "--data", files / "data.npz", "--allow", NET)
    evaluated = run(*command, "--original", files / "w.safetensors", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    facts = json.loads(evaluated.stdout)
    assert facts["original_top1_percent"] == 100
    assert facts["top1_percent"] == facts["agreement_percent"] > 50
    assert facts["macs"] < facts["original_macs"]
    assert all(re.fullmatch("[a-z0-9_]+", key) for key in facts)
    alone = run(*command)
    assert "top-1 %" in alone.stdout
    assert "MACs per image" in alone.stdout
    assert "original" not in alone.stdout
    written = run("export", tmp_path / "out", "--format", "pt2")
    assert written.returncode == 0, written.stderr
    assert "any batch of 3x12x12" in " ".join(written.stdout.split())
    fixed = run("export", tmp_path / "out", "--format", "pt2", "--fixed-batch", "--output", tmp_path / "fixed")
    assert "a batch of 1 of 3x12x12" in " ".join(fixed.stdout.split())
    assert torch.export.load(tmp_path / "out" / "model.pt2").module()(torch.zeros(4, 3, 12, 12)).shape == (4, 5)
    assert load(tmp_path / "out")(torch.zeros(2, 3, 12, 12)).shape == (2, 5)


SHORT_DEMO = """
from ghostify.cli import commands, demo
from ghostify.data import datasets
train = demo.train
demo.train = lambda *given, **options: train(*given, **{**options, "epochs": 1})
datasets.FASHION_MNIST = ()
commands.main()
"""


def test_demo(tmp_path):
    """Of one epoch; `test_demo.py` has the whole training."""
    process = run_code(SHORT_DEMO, "demo", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "calibrated" in process.stdout
    assert "bit-equal" in process.stdout
    assert not list(tmp_path.iterdir())


def test_user_errors_are_one_line_and_code_2(files, tmp_path):
    weights = ("--checkpoint", files / "w.safetensors", "--output", tmp_path / "out")
    for arguments, message in (
        (("plan", "timm:resnet81"), "ghostify: model 'timm:resnet81': timm has no model of this name"),
        (("plan", NET, "--ratio", "0.5"), "ghostify: --ratio 0.5: is not a number of at least 1"),
        (("plan", NET, "--input-size", "3x4"), "ghostify: --input-size '3x4': is not three positive sizes. Use C,H,W"),
        (("plan", NET, *SIZE, "--target", "zzz"), "ghostify: targets 'zzz': matches no convolution"),
        (("convert", NET, *SIZE, *weights, "--calibration", tmp_path / "no.npy"), "no.npy: does not exist"),
        (("convert", NET, "--arg", "width=4", *SIZE, *weights), "does not fit Straight"),
        (("convert", NET, *SIZE, *weights, "--reconstruct"), "ghostify: reconstruct: needs images. Pass calibration"),
        (("eval", tmp_path, "--data", files / "data.npz"), "Name a folder that ghostify saved"),
    ):
        process = run(*arguments)
        assert process.returncode == 2, (arguments, process.stdout, process.stderr)
        assert message in process.stderr
        assert len(process.stderr.strip().splitlines()) == 1
        assert not list(tmp_path.iterdir())


def test_policy_files(tmp_path):
    (tmp_path / "p.toml").write_text('[[rule]]\ntargets = "a.*"\nratio = 4\n')
    process = run("plan", NET, *SIZE, "--policy", tmp_path / "p.toml", "--json")
    layers = {layer["name"]: layer for layer in json.loads(process.stdout)["layers"]}
    assert layers["a.0"]["intrinsic"] == 4
    assert layers["b.0"]["skip_reason"] == "not targeted by any rule"
    refused = run("plan", NET, *SIZE, "--policy", tmp_path / "p.toml", "--target", "a.*")
    assert refused.returncode == 2


def test_narrow_is_accepted_for_prune(files, tmp_path):
    data, weights = files / "data.npz", files / "w.safetensors"
    command = ("plan", NET, *SIZE, "--checkpoint", weights, "--calibration", data, "--json")
    (tmp_path / "p.toml").write_text('[[rule]]\ncheap = "auto"\nnarrow = true\n')
    rule = ("--cheap", "auto", "--budget", "macs=0.6")
    pruned, narrowed = run(*command, *rule, "--prune"), run(*command, *rule, "--narrow")
    from_file = run(*command, "--policy", tmp_path / "p.toml", "--budget", "macs=0.6")
    assert pruned.returncode == 0, pruned.stderr
    assert pruned.stdout == narrowed.stdout == from_file.stdout
    assert pruned.stderr == ""
    assert narrowed.stderr == "ghostify: --narrow is deprecated. Use --prune.\n"
    assert from_file.stderr == f"ghostify: {tmp_path / 'p.toml'}: rule 1: narrow is deprecated. Use prune.\n"
    assert "--narrow" not in run("plan", "--help").stdout


@pytest.mark.parametrize("verb", ["plan", "convert", "eval", "export", "demo"])
def test_help_has_an_example(verb):
    assert f"Example: ghostify {verb}" in " ".join(run(verb, "--help").stdout.split())


def test_report_on_the_terminal_and_as_a_page(files, tmp_path):
    out, page, data = tmp_path / "out", tmp_path / "r.html", files / "data.npz"
    weights = files / "w.safetensors"
    process = run("convert", NET, *SIZE, "--checkpoint", weights, "--calibration", data, "--output", out)
    assert process.returncode == 0, process.stderr
    shown = run("report", out)
    assert shown.returncode == 0, shown.stderr
    assert "largest shares of the predicted output error:" in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    command = ("report", out, "--html", page, "--original", weights, "--data", data, "--runtime", "none")
    refused = run(*command)
    assert refused.returncode == 2
    assert refused.stderr.endswith(f"would run code of 'tests.nets'. If you trust who saved it, use --allow {NET}.\n")
    process = run(*command, "--allow", NET)
    assert process.returncode == 0, process.stderr
    assert "tests.nets:Straight at 3x12x12" in page.read_text()
    assert "top-1 on 24 images" in page.read_text()
    refused = run("report", out, "--html", tmp_path / "s.html", "--data", data)
    assert refused.returncode == 2
    assert "Pass its checkpoint as --original" in refused.stderr
    bad = run("report", out, "--html", tmp_path / "s.html", "--frontier", weights, "--allow", NET)
    assert bad.returncode == 2
    assert "w.safetensors: is not UTF-8 text" in bad.stderr
    assert not (tmp_path / "s.html").exists()


def test_doctor_names_versions_and_runtimes():
    process = run("doctor")
    assert process.returncode == 0, process.stderr
    assert torch.__version__ in process.stdout
    assert all(f"runtime {name}" in process.stdout for name in RUNTIMES)
    assert json.loads(run("doctor", "--json").stdout)["torch"] == torch.__version__


@pytest.mark.parametrize(("verb", "names"), [("plan", RUNTIMES), ("report", RUNTIMES), ("export", EXPORT_FORMATS)])
def test_help_lists_runtimes_and_formats(verb, names):
    text = "".join(run(verb, "--help").stdout.replace("│", "").split())
    assert ",".join(names) in text


def test_a_new_interpreter_prints_the_version():
    command = [sys.executable, "-c", CONSOLE_SCRIPT, "--version"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert (process.returncode, process.stdout) == (0, f"ghostify {ghostify.__version__}\n")


BRANCHING = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.a(x)
        return (self.b(y) if y.sum() > 0 else self.b(-y)).mean((2, 3))
"""


def test_a_class_of_the_users_comes_from_the_present_folder_and_is_allowed_by_name(tmp_path):
    (tmp_path / "ours.py").write_text(BRANCHING)
    np.save(tmp_path / "x.npy", nets.images(4).numpy())
    shapes = {"a.weight": (8, 3, 3, 3), "a.bias": (8,), "b.weight": (8, 8, 3, 3), "b.bias": (8,)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "w.safetensors")
    converted = run(
        "convert", "ours:Net", *SIZE, "--checkpoint", "w.safetensors", "--target", "b", "--output", "out", cwd=tmp_path
    )
    assert converted.returncode == 0, converted.stderr
    for verb in (("eval", "out", "--data", "x.npy"), ("report", "out")):
        refused = run(*verb, cwd=tmp_path)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "ours:Net: not in the list of what a saved model may name" in refused.stderr
        assert refused.stderr.endswith("--allow ours:Net.\n")
        for entry in ("ours:Net", "ours"):
            process = run(*verb, "--allow", entry, cwd=tmp_path)
            assert process.returncode == 0, process.stderr
