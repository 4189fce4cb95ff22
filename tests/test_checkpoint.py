import functools
import hashlib
import json
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import fx

from ghostify import GhostifyError, ghostify, load, report, save
from ghostify.io.atomic import staged_folder
from ghostify.io.checkpoint import load_weights
from ghostify.io.journal import PENDING
from ghostify.summary import conversion_info
from tests import nets
from tests.command import run_code


@pytest.fixture(scope="module")
def converted():
    model = nets.settle(nets.Residual())
    return ghostify(model, example_inputs=nets.images(1), calibration=nets.images())


def test_promise_6_a_fresh_process_reloads_bit_equal_without_user_code(tmp_path):
    for make in nets.ALL[:5]:
        model, x, folder = nets.settle(make()), nets.images(), tmp_path / make.__name__
        ghosted = ghostify(model, calibration=x)
        save(ghosted, folder)
        save_file({"x": x, "y": ghosted(x).detach().contiguous()}, folder / "io.safetensors")
    script = (
        "import sys, pickle, torch, ghostify; from safetensors.torch import load_file\n"
        "def refuse(*a, **k): raise AssertionError('pickle')\n"
        "pickle.load = pickle.loads = pickle.Unpickler = refuse\n"
        "for name in sys.argv[1:]:\n"
        "    io = load_file(name + '/io.safetensors'); model = ghostify.load(name)\n"
        "    assert torch.equal(model(io['x']), io['y']), name\n"
        "assert 'tests.nets' not in sys.modules"
    )
    process = run_code(script, *(make.__name__ for make in nets.ALL[:5]), cwd=tmp_path)
    assert process.returncode == 0, process.stderr


def test_report_source_flags_and_modes_survive(converted, tmp_path):
    converted.get_submodule("head").requires_grad_(False)
    converted.stem.train()
    save(converted, tmp_path / "out", source={"name": "timm:x", "arguments": {}})
    again = load(tmp_path / "out")
    assert report(again) == report(converted)
    assert conversion_info(again).source["name"] == "timm:x"
    flags = {n: p.requires_grad for n, p in converted.named_parameters()}
    assert {n: p.requires_grad for n, p in again.named_parameters()} == flags
    assert {n: m.training for n, m in again.named_modules()} == {n: m.training for n, m in converted.named_modules()}
    save(again, tmp_path / "twice")
    first, second = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("out", "twice"))
    assert first == second


def test_memory_format_and_dtype_survive(tmp_path):
    model = nets.settle(nets.Straight()).to(torch.bfloat16).to(memory_format=torch.channels_last)
    save(ghostify(model), tmp_path / "out")
    weight = load(tmp_path / "out").get_submodule("a.0").primary_conv.weight
    assert weight.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_failed_save_changes_nothing(converted, tmp_path, monkeypatch):
    save(converted, tmp_path / "out")
    before = content(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ghostify.io.tensor_writer.save_file", full)
    with pytest.raises(GhostifyError, match=r"out: cannot be written \(No space left on device\)"):
        save(converted, tmp_path / "out")
    assert content(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_files_of_the_user_are_refused_or_kept(converted, tmp_path):
    save(converted, tmp_path / "out")
    save(converted, tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").write_text("text")
    before = content(tmp_path)
    with pytest.raises(GhostifyError, match=r"out/thesis\.tex: was not written by ghostify"):
        save(converted, tmp_path / "out")
    assert content(tmp_path) == before
    other = ghostify(nets.settle(nets.Straight()))
    save(other, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "text"
    assert load(tmp_path / "out").state_dict().keys() == other.state_dict().keys()
    (tmp_path / "file").write_text("")
    with pytest.raises(GhostifyError, match="file: is a file"):
        save(converted, tmp_path / "file")


def test_a_folder_of_an_earlier_version_is_replaced_where_it_is_intact(converted, tmp_path):
    manifest = save(converted, tmp_path / "out") / "ghostify-files.json"
    manifest.unlink()
    save(converted, tmp_path / "out")
    assert manifest.exists()
    manifest.unlink()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(GhostifyError, match=r"model\.safetensors: was not written by ghostify, or was changed since"):
        save(converted, tmp_path / "out")


def test_exports_stay_with_a_warning_where_the_weights_change(converted, tmp_path):
    out = save(converted, tmp_path / "out")
    with staged_folder(out) as staging:
        (staging / "model.pt2").write_text("export")
    save(converted, out)
    with pytest.warns(UserWarning, match=r"out: model\.pt2 stay, from the model that was here before"):
        save(ghostify(nets.settle(nets.Straight())), out)
    assert (out / "model.pt2").read_text() == "export"


@pytest.mark.parametrize("moved", [(), ("model.safetensors",), ("model.safetensors", "ghostify.json")])
def test_a_write_that_was_interrupted_loads_as_the_new_model(tmp_path, moved):
    """As left by a killed process on a system that cannot exchange folders."""
    old, new = (ghostify(nets.settle(nets.Straight())) for _ in range(2))
    bias = next(name for name in old.state_dict() if name.endswith("bias"))
    new.get_parameter(bias).data += 1
    out = save(old, tmp_path / "out")
    save(new, tmp_path / "new").rename(out / PENDING)
    for name in moved:
        (out / PENDING / name).replace(out / name)
    assert torch.equal(load(out).get_parameter(bias), new.get_parameter(bias))
    save(old, out)
    assert torch.equal(load(out).get_parameter(bias), old.get_parameter(bias))
    assert not (out / PENDING).exists()


@pytest.mark.parametrize(
    ("name", "value"), [("stem.0.weight", "nan"), ("stem.1.running_var", "inf"), ("head.bias", "-inf")]
)
def test_weights_that_are_not_finite_are_refused(tmp_path, name, value):
    model = ghostify(nets.settle(nets.Residual()))
    dict(model.state_dict())[name].view(-1)[0] = float(value)
    with pytest.raises(GhostifyError, match=f"{name}: has NaN or infinite values|{name}: holds NaN or infinity"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_mask_may_hold_infinities(tmp_path):
    model = nets.settle(nets.Straight())
    model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    assert save(ghostify(model), tmp_path / "out")


@pytest.mark.parametrize("value", [{1}, object(), float("nan"), {1: 2, "b": 3}], ids=["set", "object", "NaN", "keys"])
def test_a_source_that_json_cannot_hold_is_refused(converted, tmp_path, value):
    with pytest.raises(GhostifyError, match=r"source: cannot be (saved|written) as JSON"):
        save(converted, tmp_path / "out", source={"a": value})
    assert not list(tmp_path.iterdir())


def rewrite_json(folder, change):
    file = folder / "ghostify.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "ghostify.json").unlink(),
            r"ghostify\.json: cannot be read \(.*\)\. Name a folder that",
        ),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors: cannot be read"),
        (lambda f: (f / "ghostify.json").write_text('{"format'), r"ghostify\.json: is truncated or not JSON"),
        (lambda f: (f / "ghostify.json").write_text("{}"), r"ghostify\.json: was not written by ghostify"),
        (lambda f: (f / "ghostify.json").write_text("[1]"), r"ghostify\.json: was not written by ghostify"),
        (
            lambda f: rewrite_json(f, lambda c: c.update(format=99)),
            r"ghostify\.json: has format 99, this version reads formats 1 and 2",
        ),
        (lambda f: rewrite_json(f, lambda c: c["report"].update(images=3)), r"ghostify\.json: was changed after"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-5]),
            r"model\.safetensors: is damaged",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1] + b"\x07"),
            r"model\.safetensors: is damaged",
        ),
    ],
)
def test_a_damaged_folder_says_which_file_and_why(converted, tmp_path, damage, message):
    save(converted, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(GhostifyError, match=message):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "torch:relu",
            r"ghostify\.json: torch:relu: is not allowed here in a saved model\. Convert and save the model again\.$",
        ),
        ("os:system", r"ghostify\.json: os:system: not in the list .*--allow os:system\.$"),
    ],
)
def test_stored_data_that_cannot_be_used_has_one_remedy(converted, tmp_path, name, message):
    folder = save(converted, tmp_path / "out")
    content = json.loads((folder / "ghostify.json").read_text())
    del content["digest"]
    content["model"]["modules"]["stem.0"]["class"] = name
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "ghostify.json").write_text(json.dumps({**content, "digest": digest}))
    with pytest.raises(GhostifyError, match=message):
        load(folder)


class Evil:
    def __reduce__(self):
        return (print, ("pwned",))


def test_plain_checkpoints_are_unwrapped_and_never_run(tmp_path, capsys):
    model = nets.settle(nets.Straight())
    state = model.state_dict()
    for number, wrapped in enumerate(
        (
            state,
            {"state_dict": state},
            {"model": state},
            {"model_ema": state},
            {f"module.{k}": v for k, v in state.items()},
        )
    ):
        file = tmp_path / f"{number}.pth"
        torch.save(wrapped, file)
        fresh = load_weights(nets.Straight(), file)
        assert all(torch.equal(v, state[k]) for k, v in fresh.state_dict().items())
    save_file(state, tmp_path / "w.safetensors")
    load_weights(nets.Straight(), tmp_path / "w.safetensors")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"state_dict": state, "more": Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(GhostifyError, match=f"{name}: is not a checkpoint that can be read without running code"):
            load_weights(nets.Straight(), tmp_path / name)
    assert "pwned" not in capsys.readouterr().out


def test_checkpoints_of_other_keys_or_shapes_are_refused(tmp_path):
    state = nets.Straight().state_dict()
    save_file({k: v for k, v in state.items() if k != "fc.bias"}, tmp_path / "less.safetensors")
    save_file({**state, "extra": torch.ones(1)}, tmp_path / "more.safetensors")
    save_file({**state, "fc.bias": torch.ones(7)}, tmp_path / "shape.safetensors")
    for name, message in (
        ("less", r"less\.safetensors: does not fit Straight, missing: fc\.bias"),
        ("more", "unexpected: extra"),
        ("shape", r"of another shape: fc\.bias"),
        ("none", r"none\.safetensors: cannot be read \(No such file"),
    ):
        with pytest.raises(GhostifyError, match=message):
            load_weights(nets.Straight(), tmp_path / f"{name}.safetensors")


def test_only_converted_models_are_saved(tmp_path):
    with pytest.raises(GhostifyError, match="has no report"):
        save(fx.symbolic_trace(nets.settle(nets.Straight())), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fc.weight", lambda v: v.to(torch.int8), "fc.weight is of type int8, the model's weights are of float32"),
        ("fc.weight", lambda v: v > 0, "fc.weight is of type bool"),
        ("fc.weight", lambda v: v.to(torch.float8_e4m3fn), "fc.weight is of type float8_e4m3fn"),
        ("fc.weight", lambda v: v.to(torch.complex64), "fc.weight is of type complex64"),
        ("a.0.weight", lambda v: torch.full_like(v, torch.nan), "a.0.weight holds values that are not finite"),
        ("a.0.weight", lambda v: torch.full_like(v, torch.inf), "a.0.weight holds values that are not finite"),
        (
            "a.1.running_var",
            lambda v: torch.full_like(v, torch.nan),
            "a.1.running_var holds values that are not finite",
        ),
        ("a.1.num_batches_tracked", lambda v: v + 0.5, "a.1.num_batches_tracked does not hold whole numbers"),
    ],
)
def test_checkpoints_of_other_values_are_refused(tmp_path, name, change, message):
    model, state = nets.Straight(), nets.Straight().state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_file({**state, name: change(state[name])}, tmp_path / "w.safetensors")
    with pytest.raises(GhostifyError, match=rf"w\.safetensors: {re.escape(message)}"):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
def test_quantized_weights_are_refused(tmp_path):
    state = nets.Straight().state_dict()
    weight = torch.quantize_per_tensor(state["fc.weight"], 0.1, 0, torch.qint8)
    torch.save({**state, "fc.weight": weight}, tmp_path / "w.pt")
    with pytest.raises(GhostifyError, match=r"w\.pt: "):
        load_weights(nets.Straight(), tmp_path / "w.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_converted_with_a_warning(tmp_path, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v.float() for k, v in nets.Straight().state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match=rf"converted from {str(dtype).removeprefix('torch.')} to float32"):
        model = load_weights(nets.Straight(), tmp_path / "w.safetensors")
    assert torch.equal(model.fc.weight, state["fc.weight"].float())


@pytest.mark.parametrize(
    "content",
    [b"", b"GIF89a" + bytes(20), b'{"weight_map": {}}', pickle.dumps([1]), b"\x80", b"PK\x03\x04" + bytes(30)],
    ids=["empty", "GIF", "index", "list", "cut pickle", "cut archive"],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors", "json"])
def test_files_that_are_no_checkpoints_are_refused_in_one_line(tmp_path, content, suffix):
    (tmp_path / f"w.{suffix}").write_bytes(content)
    with pytest.raises(GhostifyError, match=rf"^{tmp_path}/w\.{suffix}: [^\n]+\.$"):
        load_weights(nets.Straight(), tmp_path / f"w.{suffix}")


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(GhostifyError, match=r": is a folder, not a file\. Name a checkpoint file"):
        load_weights(nets.Straight(), tmp_path)


@pytest.mark.parametrize(
    "value",
    [10**200, "\ud800", functools.reduce(lambda inner, _: [inner], range(150), [])],
    ids=["long", "half", "deep"],
)
def test_a_source_that_load_would_not_read_is_refused(converted, tmp_path, value):
    with pytest.raises(GhostifyError, match=r"^source: cannot be saved as JSON \("):
        save(converted, tmp_path / "out", source={"name": value})
    assert not (tmp_path / "out").exists()
