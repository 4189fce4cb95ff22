import torch
from torch import nn

from ghostify import trace
from ghostify.graph.linear_layers import as_maps, linear_as_conv
from tests import nets


def test_a_linear_layer_is_a_convolution_of_one_position():
    for bias in (False, True):
        layer, x = nn.Linear(6, 4, bias=bias), torch.randn(3, 6)
        conv = linear_as_conv(layer)
        torch.testing.assert_close(conv(as_maps(x)), as_maps(layer(x)))
        assert conv.weight.data_ptr() == layer.weight.data_ptr()
        assert conv.weight.requires_grad


def test_linear_layers_are_listed_beside_the_convolutions():
    program = trace(nets.Classifier().eval(), nets.images(2))
    assert [(c.name, c.inputs, c.outputs, c.kernel) for c in program.linear_layers] == [
        ("fc1", 144, 32, (1, 1)),
        ("fc2", 32, 24, (1, 1)),
        ("fc3", 24, 5, (1, 1)),
    ]
    assert {c.calls[0].output_positions for c in program.linear_layers} == {2}
    assert torch.equal(program.conv("fc2").weight.flatten(1), program.module.get_submodule("fc2").weight)
    assert not {c.name for c in program.convolutions} & {c.name for c in program.linear_layers}


def test_a_linear_layer_that_never_runs_on_features_has_a_reason():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mix = nn.Conv2d(3, 4, 1), nn.Linear(12, 12)

        def forward(self, x):
            return self.mix(self.stem(x))

    (layer,) = trace(Tokens().eval(), nets.images(1)).linear_layers
    assert layer.unsupported_reason == "not called when the example inputs run"
