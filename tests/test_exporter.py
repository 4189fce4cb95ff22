import sys

import pytest
import torch
from torch import nn

from ghostify import GhostifyError, ghostify
from ghostify.deployment.exporter import export
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
    with pytest.raises(GhostifyError, match="keyword inputs"):
        export(model, tmp_path / "out", format="pt2", example_inputs={"x": x})
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(GhostifyError, match=r"'onnx': needs onnxscript. Run pip install 'ghostify\[export\]'"):
        export(model, tmp_path / "out", format="onnx", example_inputs=x)
    assert not list(tmp_path.iterdir())


def test_a_file_with_other_outputs_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Eager, "load", lambda *_: lambda *x: [torch.zeros(len(x[0]), 5)])
    with pytest.raises(GhostifyError, match=r"format 'pt2': the file differs by .* from PyTorch's outputs"):
        export(converted(), tmp_path / "out", format="pt2", example_inputs=nets.images(1))
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_exported_is_an_error_with_a_reason(tmp_path):
    with pytest.raises(GhostifyError, match=r"format 'pt2': the model cannot be exported \(.+\)\. Use"):
        export(converted(nets.Wild), tmp_path / "out", format="pt2", example_inputs=nets.images(1))
