import os
import sys

import onnx
import pytest
import torch
from torch import nn

from ghostify import GhostifyError, ghostify
from ghostify.deployment.exporter import _reason, export, export_file
from ghostify.runtimes.eager import Eager
from ghostify.runtimes.registry import EXPORT_FORMATS, load_runner
from tests import nets

FORMAT = pytest.mark.parametrize(
    "format", [pytest.param(f, marks=[pytest.mark.slow] * r.compiles_slowly) for f, r in EXPORT_FORMATS.items()]
)
pytestmark = pytest.mark.filterwarnings("default")  # the exporters' own


def converted(make=nets.Residual, **options):
    return ghostify(nets.settle(make()), example_inputs=nets.images(1), **options).eval()


@FORMAT
@pytest.mark.parametrize("make", [nets.Residual, nets.Branches], ids=lambda c: c.__name__)
def test_each_runtime_has_pytorchs_outputs_for_any_batch_size(format, make, tmp_path):
    model = converted(make)
    file = export(model, tmp_path / "out", format=format, example_inputs=nets.images(1))
    assert file.name == f"model{EXPORT_FORMATS[format].suffix}"
    run = load_runner(file, threads=1)
    for count in (1, 2, 5):
        x = nets.images(count)
        torch.testing.assert_close(run(x)[0], model(x), rtol=1e-3, atol=1e-4)
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]


class TwoInputs(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nets.conv_norm(3, 8), nets.conv_norm(8, 8)

    def forward(self, x, y):
        x = self.conv(self.stem(x))
        return x.mean((2, 3)), self.conv(self.stem(y))


@FORMAT
def test_several_inputs_and_outputs(format, tmp_path):
    if format != "pt2" and torch.__version__ < "2.7":
        pytest.skip("the exporter of torch 2.6 does not support norms that cannot be folded")
    pair = (nets.images(1), nets.images(1, seed=2))
    model = ghostify(nets.settle(TwoInputs()), example_inputs=pair).eval()
    run = load_runner(export(model, tmp_path / "out", format=format, example_inputs=pair))
    for output, expected in zip(run(*pair), model(*pair), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)


def test_nothing_is_written_where_export_fails(tmp_path, monkeypatch):
    model, x = converted(), nets.images(1)
    with pytest.raises(GhostifyError, match=r"format 'coreml': is unknown\. Use pt2, onnx, openvino, aotinductor"):
        export(model, tmp_path / "out", format="coreml", example_inputs=x)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(GhostifyError, match=r"'onnx': needs onnxscript. Run pip install 'ghostify\[export\]'"):
        export(model, tmp_path / "out", format="onnx", example_inputs=x)
    assert not list(tmp_path.iterdir())


def test_a_file_with_other_outputs_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Eager, "load", lambda *_: lambda *x, **_: [torch.zeros(len(x[0]), 5)])
    with pytest.raises(GhostifyError, match=r"format 'pt2': the file differs from PyTorch's outputs: output differs"):
        export(converted(), tmp_path / "out", format="pt2", example_inputs=nets.images(1))
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_exported_is_an_error_with_a_reason(tmp_path):
    with pytest.raises(GhostifyError, match=r"format 'pt2': the model cannot be exported \(.+\)\. Use"):
        export(converted(nets.Wild), tmp_path / "out", format="pt2", example_inputs=nets.images(1))


FAST_FORMAT = pytest.mark.parametrize("format", ["pt2", "onnx", "openvino"])


class Answering(nets.Straight):
    """Answers with `answer` of its scores."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(super().forward(x))


def answering(answer, x):
    return ghostify(nets.settle(Answering(answer)), example_inputs=x)


@FAST_FORMAT
def test_the_batch_size_is_fixed_where_the_model_fixes_it(format, tmp_path):
    x = nets.images(2)
    model = answering(lambda y: y.reshape(2, 5, 1), x)
    with pytest.warns(UserWarning, match=r"the batch size is fixed \(.*constant \(2\)\)\. Pass dynamic=False"):
        file = export(model, tmp_path / "a", format=format, example_inputs=x)
    torch.testing.assert_close(load_runner(file)(x)[0], model(x), rtol=1e-3, atol=1e-4)
    with pytest.raises(GhostifyError, match=r"with a free batch size \(.*\)\. Pass dynamic=False \(--fixed-batch\)"):
        export(model, tmp_path / "b", format=format, example_inputs=x, dynamic=True)
    assert not (tmp_path / "b").exists()


@FAST_FORMAT
@pytest.mark.filterwarnings("error:export")
def test_the_batch_size_is_fixed_or_free_as_the_user_says(format, tmp_path):
    model, x = converted(), nets.images(1)
    free = export_file(model, tmp_path / "free", format=format, example_inputs=x, dynamic=True)
    fixed = export_file(model, tmp_path / "fixed", format=format, example_inputs=x, dynamic=False)
    assert (free.free_batch, free.fixed_reason, fixed.free_batch, fixed.fixed_reason) == (True, "", False, "")
    assert load_runner(free.path)(nets.images(3))[0].shape == (3, 5)
    assert load_runner(fixed.path)(x)[0].shape == (1, 5)
    with pytest.raises(Exception, match=r"[Ss]hape|size|dimension"):
        load_runner(fixed.path)(nets.images(3))


@FAST_FORMAT
def test_outputs_of_any_type_are_exported(format, tmp_path):
    x = nets.images(2)
    model = answering(lambda y: (y, {"mask": y > 0, "classes": y.argmax(1)}, None, 3, [y.half()]), x)
    outputs = load_runner(export(model, tmp_path, format=format, example_inputs=x))(x)
    assert [y.dtype for y in outputs] == [torch.float32, torch.bool, torch.int64, torch.float16]
    assert torch.equal(outputs[1], model(x)[1]["mask"])


class Scaled(nets.Straight):
    """Two inputs, of which one is optional, and an optional third."""

    def forward(self, x, scale=None, offset=None):
        y = super().forward(x) * scale
        return y if offset is None else y + offset


class Named(nets.Straight):
    """A dict as input."""

    def forward(self, given):
        return super().forward(given["image"]) * given["scale"]


@FAST_FORMAT
def test_keywords_and_dicts_keep_their_names(format, tmp_path):
    x, scale = nets.images(2), torch.tensor([[2.0], [3.0]])
    keywords = {"scale": scale, "x": x}
    scaled = ghostify(nets.settle(Scaled()), example_inputs=keywords)
    file = export(scaled, tmp_path / "a", format=format, example_inputs=keywords)
    torch.testing.assert_close(load_runner(file)(**keywords)[0], scaled(**keywords), rtol=1e-3, atol=1e-4)
    named = ghostify(nets.settle(Named()), example_inputs=({"scale": scale, "image": x},))
    other = export(named, tmp_path / "b", format=format, example_inputs=({"scale": scale, "image": x},))
    expected = named({"scale": scale, "image": x})
    torch.testing.assert_close(load_runner(other)({"scale": scale, "image": x})[0], expected, rtol=1e-3, atol=1e-4)
    if format == "onnx":
        names = [[i.name for i in onnx.load(path).graph.input] for path in (file, other)]
        assert names == [["x", "scale"], ["scale", "image"]]
        torch.testing.assert_close(load_runner(other)({"image": x, "scale": scale})[0], expected, rtol=1e-3, atol=1e-4)


@FAST_FORMAT
def test_random_outputs_are_refused(format, tmp_path):
    x = nets.images(2)
    model = answering(lambda y: nn.functional.dropout(y, 0.5, True), x)
    with pytest.raises(GhostifyError, match="two runs on the same inputs differ") as caught:
        export(model, tmp_path / "out", format=format, example_inputs=x)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(lambda: Answering(nn.functional.rrelu), torch.float32), (nets.Straight, torch.bfloat16)],
    ids=["operator", "bfloat16"],
)
def test_what_a_runtime_cannot_do_is_one_plain_line(make, dtype, tmp_path):
    x = nets.images(2).to(dtype)
    model = ghostify(nets.settle(make()).to(dtype), example_inputs=x)
    with pytest.raises(GhostifyError, match=r"format 'onnx': .*Use another format") as caught:
        export(model, tmp_path / "out", format="onnx", example_inputs=x)
    assert str(caught.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_a_model_that_overwrites_its_input_is_exported(tmp_path):
    class Overwriting(nets.Straight):
        def forward(self, x):
            return super().forward(x.add_(1))

    x = nets.images(2)
    model = ghostify(nets.settle(Overwriting()), example_inputs=x.clone())
    file = export(model, tmp_path, format="pt2", example_inputs=x)
    assert torch.equal(x, nets.images(2))
    torch.testing.assert_close(load_runner(file)(x.clone())[0], model(x.clone()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_exported_with_its_tolerance(dtype, tmp_path):
    x = nets.images(2).to(dtype)
    model = ghostify(nets.settle(nets.Residual()).to(dtype), example_inputs=x)
    assert load_runner(export(model, tmp_path, format="pt2", example_inputs=x))(x)[0].dtype == dtype


def test_the_first_sentence_of_the_cause_is_the_reason():
    error = RuntimeError("Step 3/3 failed")
    error.__cause__ = ValueError("\x1b[96mno such operator: x\x1b[0m. See below.\nmore")
    assert _reason(error) == "no such operator: x"
    assert _reason(KeyError()) == "KeyError"
    constraint = RuntimeError("Constraints violated (batch)! For more\n  - it is a constant (2). If")
    assert _reason(constraint) == "it is a constant (2)"


class _PartWithoutGradients(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        with torch.no_grad():
            x = self.stem(x)
        return self.conv(x)


def test_hooks_of_the_model_and_parts_without_gradients_are_exported(tmp_path):
    x = torch.randn(2, 3, 12, 12)
    hooked = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).eval()
    hooked.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    for number, model in enumerate((hooked, _PartWithoutGradients().eval())):
        converted = ghostify(model, 2, example_inputs=x)
        file = export(converted, tmp_path / str(number), format="pt2", example_inputs=x)
        with torch.no_grad():
            torch.testing.assert_close(torch.export.load(file).module()(x), converted(x), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="names of other bytes than UTF-8")
def test_a_name_that_is_not_unicode_is_refused(tmp_path):
    with pytest.raises(GhostifyError, match="is not UTF-8 text"):
        export(converted(), tmp_path / os.fsdecode(b"\xff"), format="onnx", example_inputs=nets.images(1))
    assert not [*tmp_path.iterdir()]
