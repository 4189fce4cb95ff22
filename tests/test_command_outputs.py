"""Where the commands write: places are checked before any work, and the user's files stay."""

import json
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from ghostify import load
from ghostify.cli import exit_codes
from tests import nets
from tests.command import FORKS, run_command

ROOT = Path(__file__).parent.parent
NET, SIZE = "tests.nets:Straight", ("--input-size", "3,12,12")
ALLOW = ("--allow", NET)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights, labelled images, and a converted model in `out`."""
    folder = tmp_path_factory.mktemp("files")
    model, images = nets.settle(nets.Straight()), nets.images(24)
    save_file(model.state_dict(), folder / "w.safetensors")
    np.savez(folder / "data.npz", images=images.numpy(), labels=model(images).argmax(1).numpy())
    assert run("convert", *given(folder), "--output", folder / "out").returncode == 0
    return folder


def run(*arguments):
    return run_command(*arguments, cwd=ROOT)


def given(files):
    return (NET, *SIZE, "--checkpoint", files / "w.safetensors")


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def writers(files, place):
    """The arguments of each command that writes to a place."""
    data, weights = ("--data", files / "data.npz"), ("--original", files / "w.safetensors")
    return {
        "convert": ("convert", *given(files), "--output", place),
        "export": ("export", files / "out", "--format", "pt2", "--output", place),
        "finetune": ("finetune", files / "out", *data, *weights, *ALLOW, "--batch", 8, "--output", place),
        "study": ("study", NET, *SIZE, *data, "--layer", "a.0", "--output", place),
        "report": ("report", files / "out", "--html", place, *ALLOW, "--runtime", "none"),
        "plan": ("plan", *given(files), "--points", 2, "--frontier", place),
    }


@pytest.mark.parametrize("verb", ["convert", "export", "finetune", "study", "report", "plan"])
def test_places_of_the_user_are_refused_before_any_work(files, tmp_path, verb):
    is_file = verb in ("report", "plan")
    place = tmp_path / ("thesis.html" if is_file else "thesis")
    mine = place if is_file else place / "chapter.tex"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("dear")
    process = run(*writers(files, place)[verb])
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert f"{mine}: was not written by ghostify" in process.stderr
    assert content(tmp_path) == {str(mine.relative_to(tmp_path)): b"dear"}


@pytest.mark.parametrize("verb", ["convert", "export", "finetune", "study"])
def test_with_overwrite_files_of_the_user_stay(files, tmp_path, verb):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    process = run(*writers(files, tmp_path / "out")[verb], "--overwrite")
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert len(list((tmp_path / "out").iterdir())) >= 3


@pytest.mark.parametrize("place", [".", "/", "..", "w.safetensors/out", "n" * 300])
@pytest.mark.parametrize("verb", ["convert", "report"])
def test_places_that_cannot_be_written_are_one_line(files, verb, place):
    before = content(files)
    where = files / place if "out" in place or "n" in place else place
    process = run(*writers(files, where)[verb])
    assert (process.returncode, process.stderr.count("\n")) == (2, 1), process.stderr
    assert content(files) == before


def test_an_export_into_the_folder_of_the_model_needs_no_flag_also_from_within(files, tmp_path):
    out = tmp_path / "out"
    assert run("convert", *given(files), "--output", out).returncode == 0
    for cwd, folder in ((ROOT, out), (out, ".")):
        process = run_command("export", folder, "--format", "pt2", cwd=cwd)
        assert process.returncode == 0, process.stderr
    assert (out / "model.pt2").exists()
    again = run("convert", *given(files), "--ratio", 4, "--output", out)
    assert again.returncode == 0
    assert "model.pt2 stay, from the model that was here before" in again.stderr
    assert load(out)


def test_a_page_and_a_frontier_are_replaced_by_themselves_alone(files, tmp_path):
    page, curve = tmp_path / "r.html", tmp_path / "f.json"
    for _ in range(2):
        assert run(*writers(files, page)["report"]).returncode == 0
        assert run(*writers(files, curve)["plan"]).returncode == 0
    assert json.loads(curve.read_text())["points"]
    assert run(*writers(files, page)["plan"]).returncode == 2
    assert run(*writers(files, curve)["report"]).returncode == 2
    assert run(*writers(files, page)["plan"], "--overwrite").returncode == 0


def wait_with_a_temporary_folder(sender):
    def work(**_):
        with tempfile.TemporaryDirectory() as folder:
            sender.send(folder)
            time.sleep(60)

    sys.exit(exit_codes.run(work))


def test_a_terminated_command_removes_its_temporary_files():
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=wait_with_a_temporary_folder, args=(sender,))
    process.start()
    folder = Path(receiver.recv())
    assert folder.exists()
    process.terminate()
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM
    assert not folder.exists()
