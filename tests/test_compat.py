"""Folders saved by earlier versions: they load, compute bit-equal outputs and are saved again in the present format."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ghostify import GhostifyError, load, report, save
from ghostify.deprecation import LAYER_FIELDS, RECONSTRUCTION_FIELDS, REPORT_FIELDS
from ghostify.imports import import_object
from ghostify.io.format1 import IMPORT_PATHS, upgrade

FORMAT1 = Path(__file__).parent / "data/format1"
FOLDERS = sorted(p for p in FORMAT1.iterdir() if p.is_dir())
every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums over several threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def saved_tensors(folder, kind):
    tensors = load_file(folder.with_name(f"{folder.name}.io.safetensors"))
    return [tensors[name] for name in sorted(tensors) if name.startswith(kind)]


def outputs_of(model, inputs):
    with torch.no_grad():
        outputs = model.eval()(*inputs)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def description_of(folder):
    return json.loads((folder / "ghostify.json").read_text())


@every_folder
def test_a_folder_of_format_1_gives_its_saved_outputs(folder):
    outputs = outputs_of(load(folder), saved_tensors(folder, "input"))
    same_kernels = torch.backends.cpu.get_cpu_capability() == "AVX512"  # as where the folders were saved
    tolerance = 0.0 if same_kernels else 1e-6
    for output, expected in zip(outputs, saved_tensors(folder, "output"), strict=True):
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


@every_folder
def test_a_folder_of_format_1_is_saved_as_format_2_and_loads_bit_equal(folder, tmp_path):
    model, inputs = load(folder), saved_tensors(folder, "input")
    save(model, tmp_path / "again")
    assert description_of(tmp_path / "again")["format"] == 2
    again = load(tmp_path / "again")
    assert report(again) == report(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    for output, expected in zip(outputs_of(again, inputs), outputs_of(model, inputs), strict=True):
        assert torch.equal(output, expected)


@every_folder
def test_a_report_of_format_1_keeps_its_values(folder):
    old, new = description_of(folder)["report"], json.loads(json.dumps(report(load(folder)).to_dict()))
    assert report(load(folder)).rewritten > 0
    assert len(old["lines"]) == len(new["layers"]) > 0
    for old_layer, layer in zip(old["lines"], new["layers"], strict=True):
        assert {LAYER_FIELDS.get(key, key): value for key, value in old_layer.items()} == layer
    for key in old.keys() - {"lines", "reconstruction"}:
        assert old[key] == new[REPORT_FIELDS.get(key, key)]
    assert new["reconstruction"] == upgrade(description_of(folder))["report"]["reconstruction"]


def test_the_errors_of_a_reconstruction_keep_their_values():
    block = {"layers": ["a", "b"], "before": 0.5, "after": 0.25, "steps": 75}
    old = {"lines": [], "lost": ["m"], "reconstruction": {"blocks": [block], "before": 0.1, "after": 0.05}}
    upgraded = upgrade({"format": 1, "model": {}, "report": old})["report"]
    assert RECONSTRUCTION_FIELDS == {"before": "error_before", "after": "error_after"}
    assert upgraded == {
        "layers": [],
        "missing_attributes": ["m"],
        "reconstruction": {
            "blocks": [{"layers": ["a", "b"], "error_before": 0.5, "error_after": 0.25, "steps": 75}],
            "error_before": 0.1,
            "error_after": 0.05,
        },
    }


def test_every_old_import_path_becomes_one_that_exists_and_occurs_in_a_folder():
    for old, new in IMPORT_PATHS.items():
        import_object(new)
        with pytest.raises(ImportError):
            import_object(old)
    texts = [(folder / "ghostify.json").read_text() for folder in FOLDERS]
    assert all(any(f'"{old}"' in text for text in texts) for old in IMPORT_PATHS)


def test_the_guards_of_a_traced_model_of_format_1_still_check():
    model = load(FORMAT1 / "guards").eval()
    x = torch.zeros(1, 3, 8, 8)
    assert model(x).shape == (1, 4)
    for arguments, message in (
        ((x, 2.0), "argument 'scale' was fixed at its default"),
        ((x, 1.0, x), "when the model was traced"),
    ):
        with pytest.raises(GhostifyError, match=message):
            model(*arguments)
    with pytest.raises(GhostifyError, match="branches on its mode and was traced in eval mode"):
        model.train()(x)


def test_a_folder_of_format_1_with_a_forged_digest_is_refused(tmp_path):
    folder = shutil.copytree(FOLDERS[0], tmp_path / "forged")
    content = description_of(folder)
    content["report"]["images"] += 1
    (folder / "ghostify.json").write_text(json.dumps(content))
    with pytest.raises(GhostifyError, match=r"ghostify\.json: was changed after it was saved"):
        load(folder)


@pytest.mark.parametrize("key", ["report", "source", "tensors"])
def test_incomplete_content_of_format_1_is_refused(key, tmp_path):
    folder = shutil.copytree(FOLDERS[0], tmp_path / "incomplete")
    content = {k: v for k, v in description_of(folder).items() if k not in (key, "digest")}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "ghostify.json").write_text(json.dumps({**content, "digest": digest}))
    with pytest.raises(GhostifyError, match=r"ghostify\.json: is incomplete"):
        load(folder)


@pytest.mark.parametrize("number", [0, 3, "2", None])
def test_an_unknown_format_is_refused_in_one_line(number, tmp_path):
    folder = shutil.copytree(FOLDERS[0], tmp_path / "other")
    (folder / "ghostify.json").write_text(json.dumps({**description_of(folder), "format": number}))
    with pytest.raises(GhostifyError, match=r"this version reads formats 1 and 2\. Convert the model again") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert repr(number) in str(caught.value)
