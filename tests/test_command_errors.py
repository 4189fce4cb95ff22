"""Every argument and option of every command with wrong values: exit code 2, one line, nothing changed on disk.

The rows are made from the command itself: an option without wrong values in `WRONG` fails a test.
"""

import os
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from ghostify.cli.commands import app, main
from tests import nets
from tests.test_recipe import WRONG as WRONG_SETTINGS

NET, LONG = "tests.nets:Straight", "n" * 300
COMMANDS = typer.main.get_command(app).commands
WITHOUT_ROWS = {"help", "install_completion", "show_completion"}

NOT_NUMBERS = ("x", "", "²", "1,5", "0x10", "None")
NOT_COUNTS = (*NOT_NUMBERS, "0", "-1", "2.5", "1e3", "9" * 30)
NOT_SEEDS = (*NOT_NUMBERS, "-1", "1.5", str(2**80))
NOT_LENGTHS = (*NOT_NUMBERS, "0", "-1", "nan", "inf", "1e999")
NOT_FILES = ("missing", "", "folder", "missing/x", LONG)
NOT_OUTPUTS = ("w.safetensors/x", "w.safetensors", LONG)
NOT_DATA = (
    "missing", "missing.npy", LONG, "w.txt", "folder", "empty.npy", "text.npy", "huge.npy", "dates.npy",
    "complex.npy", "nan.npy", "no-images.npy", "flat.npy", "one-channel.npy", "objects.npy", "empty.npz", "unnamed.npz",
    "empty.safetensors", "pipe.npy", "broken", "gif", "huge", "pipes",
)  # fmt: skip
NOT_LABELLED = ("few.npz", "fractions.npz", "negative.npz", "beyond.npz")
NOT_CHECKPOINTS = (
    *NOT_FILES, "empty.pt", "gif.pt", "list.pt", "cut.safetensors", "int8.safetensors", "bool.safetensors",
    "nan.safetensors", "other.safetensors", "data.npz", "index.json", "pipe.pt",
)  # fmt: skip
NOT_FOLDERS = ("missing", "", "folder", "w.safetensors", LONG, "changed", "cut")
NOT_RUNTIMES = ("x", "", "EAGER", "eager,onnx")
NOT_FLAGS = ("=yes", "=")
NOT_BUDGETS = (
    "0.5", "",
    "macs", "macs=", "macs=half", "macs=0", "macs=-1", "macs=NaN", "macs=Infinity", "macs=1e999", "macs=true",
    "macs=null", "macs=[0.5]", "macs={}", "flops=0.5", "=0.5", "macs=" + "[" * 100_000, "max_drop=-1", "max_drop=1",
)  # fmt: skip
NOT_SIZES = (
    "3", "3,12",
    "3,12,12,12", "3,0,12", "3,-1,12", "3x12x12", "3,²,12", "3,1.5,12", "", ",,", "3,99999999999,99999999999",
    "3,60000,60000", "3," + "9" * 5000 + ",12", "3,1,1e1",
)  # fmt: skip
NOT_MODELS = (
    "", "x", ":", "timm:", "timm:resnet81", "torchvision:", "torchvision:lenet", "..:x", ".a:b", "a..b:c", "a:b:c",
    "no.such:Net", "tests.nets:Nope", "tests.nets:images", "tests.nets:settle", "math:pi", "tests:", ":Straight", LONG,
    "[/x]:y", "tests.nets:Straight.forward",
)  # fmt: skip
NOT_ARGUMENTS = ("width", "=3", "width=x", "width=-1", "width=null", "wid th=3", "depth=3", "width=" + "[" * 100_000)
NOT_PATTERNS = ("zzz", "re:(", "", "[/x]", "[", "a.0 ")
NOT_SETTINGS = (
    "x", "=1", "depth=3", "ema=" + "[" * 100_000, "ema=abc", "frozen_norms=False", "optimizer=foo", "schedule=foo",
    "labels=abc", "workers=a", "distill=null", "distill=0", "features=NaN", "mixup={}",
    *(f"{key}={value}" for key, values in WRONG_SETTINGS.items() for value in values
      if not isinstance(value, bool | list) and value is not None),
)  # fmt: skip
NOT_POLICIES = (
    *NOT_FILES,
    "w.txt",
    "w.safetensors",
    "empty.toml",
    "key.toml",
    "ratio.toml",
    "pattern.toml",
    "rule.toml",
)
NOT_FRONTIERS = (*NOT_FILES, "w.txt", "w.safetensors", "index.json", "deep.json")

WRONG = {
    "model": NOT_MODELS,
    "folder": NOT_FOLDERS,
    "--ratio": (*NOT_NUMBERS, "nan", "inf", "0", "-1", "0.99", "1e999", "-inf"),
    "--dw-size": (*NOT_COUNTS, "2", "257"),
    "--cheap": ("²", "0", "-1", "1.5", "", "x", "Depthwise", "9" * 5000),
    "--activated": NOT_FLAGS,
    "--prune": NOT_FLAGS,
    "--narrow": NOT_FLAGS,
    "--reconstruct": NOT_FLAGS,
    "--heal": NOT_LENGTHS,
    "--json": NOT_FLAGS,
    "--version": NOT_FLAGS,
    "--target": NOT_PATTERNS,
    "--ignore": NOT_PATTERNS,
    "--policy": NOT_POLICIES,
    "--budget": NOT_BUDGETS,
    "--runtime": NOT_RUNTIMES,
    "--format": NOT_RUNTIMES,
    "--points": (*NOT_COUNTS, "1", "1000000"),
    "--checkpoint": NOT_CHECKPOINTS,
    "--original": NOT_CHECKPOINTS,
    "--calibration": NOT_DATA,
    "--validation": (*NOT_DATA, *NOT_LABELLED, "data.npy"),
    "--data": NOT_DATA,
    "--images": NOT_COUNTS,
    "--batch": NOT_COUNTS,
    "--arg": NOT_ARGUMENTS,
    "--input-size": NOT_SIZES,
    "--seed": NOT_SEEDS,
    "--epochs": NOT_LENGTHS,
    "--lr": NOT_LENGTHS,
    "--set": NOT_SETTINGS,
    "--allow": ("", "tests..nets:Straight", "tests.nets:Straight.forward()"),
    "--layer": ("zzz", "[/x]"),
    "--output": NOT_OUTPUTS,
    "--frontier": (*NOT_OUTPUTS[:1], "folder", LONG),
    "--html": (*NOT_OUTPUTS[:1], "folder", LONG),
    "--overwrite": NOT_FLAGS,
    "--dynamic": NOT_FLAGS,
    "plan --input-size": (*NOT_SIZES, "1,12,12"),
    "report --frontier": NOT_FRONTIERS,
    "eval --data": (*NOT_DATA, *NOT_LABELLED),
    "finetune --data": (*NOT_DATA, *NOT_LABELLED, "imagenet", "cifar-10"),
    "report --data": (*NOT_DATA, *NOT_LABELLED),
    "demo --output": ("w.safetensors", "w.safetensors/x", LONG, "out"),
}
FOLDER = ("out", "--allow", NET)
BASE = {
    "plan": (NET, "--input-size", "3,12,12"),
    "convert": (NET, "--input-size", "3,12,12", "--checkpoint", "w.safetensors", "--output", "new"),
    "eval": (*FOLDER, "--data", "data.npz"),
    "finetune": (*FOLDER, "--data", "data.npz", "--original", "w.safetensors", "--output", "new", "--batch", "8"),
    "export": FOLDER,
    "study": (NET, "--input-size", "3,12,12", "--layer", "a.0", "--data", "data.npz", "--output", "new"),
    "report": FOLDER,
    "doctor": (),
    "demo": (),
}
MORE = {  # without which an option would not be used
    "plan --points": ("--frontier", "new.json"),
    "plan --validation": ("--frontier", "new.json"),
    "convert --validation": ("--budget", "max_drop=1", "--calibration", "data.npz"),
    **{f"report {name}": ("--html", "new.html") for name in ("--original", "--data", "--layer", "--frontier")},
    "report --data": ("--html", "new.html", "--original", "w.safetensors"),
    "report --layer": ("--html", "new.html", "--original", "w.safetensors", "--data", "data.npz"),
}


@dataclass(frozen=True)
class Row:
    command: str
    name: str
    value: str

    @property
    def words(self) -> list[str]:
        """The command line: valid but for one value."""
        base = [*BASE[self.command], *MORE.get(f"{self.command} {self.name}", ())]
        if not self.name.startswith("-"):
            return [self.command, self.value, *base[1:]]
        if self.value in NOT_FLAGS:
            return [self.command, *base, f"{self.name}{self.value}"]
        if self.name in base:
            at = base.index(self.name)
            del base[at : at + 2]
        return [self.command, *base, self.name, self.value]

    @property
    def id(self) -> str:
        return f"{self.command} {self.name} {self.value[:30]}"


def wrong_values(command, name):
    return WRONG.get(f"{command} {name}", WRONG.get(name))


def parameters():
    """Every argument and option of every command."""
    for command, definition in COMMANDS.items():
        for parameter in definition.params:
            if parameter.name not in WITHOUT_ROWS:
                yield command, parameter.opts[0] if parameter.param_type_name == "option" else parameter.name


def rows():
    """All values for the first command that has an option, and two for each other one, which shares the checks."""
    complete = set()
    for command, name in parameters():
        values = wrong_values(command, name) or ()
        key = f"{command} {name}" if f"{command} {name}" in WRONG else name
        yield from (Row(command, name, value) for value in (values[:2] if key in complete else values))
        complete.add(key)


ROWS = list(rows())


def npy_header(shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a converted model, its weights, labelled images, and files of many kinds that are wrong."""
    folder = tmp_path_factory.mktemp("here")
    model = nets.settle(nets.Straight())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "w.safetensors")
    images = nets.images(24).numpy()
    labels = model(torch.from_numpy(images)).argmax(1).numpy()
    np.savez(folder / "data.npz", images=images, labels=labels)
    write_wrong_data(folder, images)
    write_wrong_checkpoints(folder, state)
    write_wrong_texts(folder)
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, folder, "convert", *BASE["convert"][:-1], "out") == 0
    for name, change in (
        ("changed", lambda text: text.replace("Straight", "Strange")),
        ("cut", lambda text: text[:99]),
    ):
        (folder / name).mkdir()
        (folder / name / "ghostify.json").write_text(change((folder / "out" / "ghostify.json").read_text()))
        (folder / name / "model.safetensors").write_bytes((folder / "out" / "model.safetensors").read_bytes())
    return folder


def write_wrong_data(folder, images):
    arrays = {
        "text": np.array(["a", "b"]),
        "dates": images.astype("M8[s]"),
        "complex": images.astype("c8"),
        "nan": np.full_like(images, np.nan),
        "no-images": images[:0],
        "flat": images[:, 0, 0],
        "one-channel": images[:, :1],
        "objects": np.array([{}]),
        "data": images,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
    labels = {"few": [1] * 3, "fractions": [0.5] * 24, "negative": [-1] * 24, "beyond": [5] * 24}
    for name, values in labels.items():
        np.savez(folder / f"{name}.npz", images=images, labels=np.array(values))
    np.savez(folder / "unnamed.npz", a=images, b=images)
    (folder / "huge.npy").write_bytes(npy_header((10**6, 3, 1000, 1000)))
    for name in ("empty.npy", "empty.npz", "empty.safetensors"):
        (folder / name).touch()
    for name in ("folder", "broken", "gif", "huge", "pipes"):
        (folder / name).mkdir()
    (folder / "broken" / "x.png").write_text("no image")
    (folder / "gif" / "x.gif").write_bytes(b"GIF89a")
    Image.new("1", (20_000, 20_000)).save(folder / "huge" / "x.png")
    os.mkfifo(folder / "pipes" / "x.png")
    os.mkfifo(folder / "pipe.npy")
    os.mkfifo(folder / "pipe.pt")


def write_wrong_checkpoints(folder, state):
    save_file({k: v.to(torch.int8) for k, v in state.items()}, folder / "int8.safetensors")
    save_file({k: v > 0 for k, v in state.items()}, folder / "bool.safetensors")
    save_file({**state, "fc.bias": state["fc.bias"] * torch.nan}, folder / "nan.safetensors")
    save_file(nets.Residual().state_dict(), folder / "other.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "w.safetensors").read_bytes()[:-9])
    (folder / "empty.pt").touch()
    (folder / "gif.pt").write_bytes(b"GIF89a" + bytes(20))
    torch.save([1, 2], folder / "list.pt")


def write_wrong_texts(folder):
    texts = {
        "w.txt": "[no text for anybody",
        "index.json": '{"weight_map": {}}',
        "deep.json": "[" * 100_000,
        "empty.toml": "",
        "key.toml": "[[rule]]\ndepth = 3\n",
        "ratio.toml": '[[rule]]\nratio = "2"\n',
        "rule.toml": "rule = 3\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)


def run(patch, folder, *words):
    """The exit code of a command in a folder."""
    patch.chdir(folder)
    patch.setattr(sys, "argv", ["ghostify", *words])
    patch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def content(folder):
    """Size and time of every file."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def test_every_option_has_wrong_values():
    assert [f"{command} {name}" for command, name in parameters() if not wrong_values(command, name)] == []
    assert len(ROWS) > 365


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_wrong_value_ends_with_one_line(here, monkeypatch, capfd, row):
    before = content(here)
    code = run(monkeypatch, here, *row.words)
    out, err = capfd.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("ghostify: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert len(err) < 1200
    option = row.name.lstrip("-")
    named = (option, option.replace("-", "_"), row.value.partition("=")[0][:20] or "''")
    assert any(name in err for name in named), err
    assert content(here) == before
