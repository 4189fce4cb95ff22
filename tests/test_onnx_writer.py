import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ghostify.deployment.inference_form import deploy
from ghostify.modules.layout import Depthwise, GhostLayout, Pointwise
from ghostify.runtimes.onnx_writer import write_onnx
from ghostify.runtimes.registry import load_runner
from ghostify.timing.latency import _build_layer
from tests import nets

LAYOUTS = [
    None,
    GhostLayout(80, 40, Depthwise(3)),
    GhostLayout(80, 70, Depthwise(5)),
    GhostLayout(80, 70, Pointwise()),
    GhostLayout(80, 20, Pointwise()),
]


@given(
    st.sampled_from(LAYOUTS), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2), st.sampled_from([1, 3, (1, 3)])
)
@settings(max_examples=25, deadline=None)
def test_written_layers_have_pytorchs_outputs(tmp_path_factory, layout, stride, padding, dilation, kernel):
    folder = tmp_path_factory.mktemp("written")
    conv = nn.Conv2d(6, 80, kernel, stride=stride, padding=padding, dilation=dilation)
    x = torch.randn(2, 6, 9, 9)
    deployed, _ = _build_layer((conv, layout), tuple(x.shape))
    assert write_onnx(deployed, (x,), folder / "model.onnx")
    for runtime in ("onnx", "openvino"):
        output = load_runner(folder / "model.onnx", 1, runtime=runtime)(x)[0]
        torch.testing.assert_close(output, deployed(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    ],
)
def test_graphs_with_other_nodes_are_not_written(model, tmp_path):
    x = nets.images(1)
    assert not write_onnx(deploy(nn.Sequential(model).eval(), x), (x,), tmp_path / "model.onnx")
    assert not write_onnx(nn.Identity(), (x,), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class InPlaceSum(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        y += x
        return F.relu(torch.cat((y, y), dim=1))


def test_functions_and_sums_in_place_are_written_too(tmp_path):
    x = nets.images(1)
    deployed = deploy(InPlaceSum().eval(), x)
    assert write_onnx(deployed, (x,), tmp_path / "model.onnx")
    torch.testing.assert_close(
        load_runner(tmp_path / "model.onnx", 1, runtime="onnx")(x)[0], deployed(x), rtol=1e-3, atol=1e-4
    )
