"""Converted models in the quantizers of PyTorch and of ONNX Runtime."""

import copy

import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch.ao.quantization import (
    QuantWrapper,
    convert,
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
    prepare_qat,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

from ghostify import deploy, export, ghostify
from ghostify.runtimes.registry import load_runner
from tests import nets

pytestmark = pytest.mark.filterwarnings("default")  # the quantizers' own
IMAGES = nets.images(4)
MAX_SHARE = 0.2  # of the largest output: eight bits, and batch statistics of four images


def converted():
    torch.manual_seed(0)
    return ghostify(nets.settle(nets.Straight()), targets="*", example_inputs=IMAGES)


def eager_qat(model):
    wrapped = QuantWrapper(model).train()
    wrapped.qconfig = get_default_qat_qconfig("x86")
    prepared = prepare_qat(wrapped)
    prepared(IMAGES).sum().backward()
    return convert(prepared.eval())


def fx_qat(model):
    prepared = prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (IMAGES,))
    prepared(IMAGES).sum().backward()
    return convert_fx(prepared.eval())


def fx_static(model):
    prepared = prepare_fx(deploy(model, IMAGES), get_default_qconfig_mapping("x86"), (IMAGES,))
    prepared(IMAGES)
    return convert_fx(prepared)


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="quantizes for x86 processors")
@pytest.mark.parametrize("quantize", [eager_qat, fx_qat, fx_static])
def test_pytorch_quantizes_ghost_modules(quantize):
    model = converted()
    expected = model(IMAGES)
    quantized = quantize(copy.deepcopy(model))
    assert len([m for m in quantized.modules() if "quantized" in type(m).__module__ and "Conv" in type(m).__name__]) > 3
    assert (quantized(IMAGES) - expected).abs().max() < MAX_SHARE * expected.abs().max()


class Reader(CalibrationDataReader):
    """Three batches of images."""

    def __init__(self):
        self.batches = iter([{"x": nets.images(4, seed=k).numpy()} for k in range(3)])

    def get_next(self):
        return next(self.batches, None)


def test_onnx_runtime_quantizes_an_exported_model(tmp_path):
    model = converted()
    file = export(model, tmp_path, format="onnx", example_inputs=IMAGES)
    quantize_static(str(file), str(tmp_path / "quantized.onnx"), Reader())
    expected = model(IMAGES)
    output = load_runner(tmp_path / "quantized.onnx")(IMAGES)[0]
    assert (output - expected).abs().max() < MAX_SHARE * expected.abs().max()
