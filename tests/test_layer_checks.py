import pytest
import torch
from torch import nn

from ghostify import GhostifyError
from ghostify.graph.layer_checks import check_layer
from ghostify.modules.ghost import CheapOperation, build_ghost_module
from ghostify.modules.layout import GhostLayout


def ghost():
    layer = build_ghost_module(nn.Conv2d(3, 10, 3), GhostLayout.of_width(10, 4, 1, 3))
    assert isinstance(layer.cheap_operation, CheapOperation)
    layer.order = torch.randperm(10)
    return layer


LAYERS = {
    "conv": lambda: nn.Conv2d(4, 6, (3, 1), padding="same", groups=2, padding_mode="reflect"),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "norm": lambda: nn.BatchNorm2d(4),
    "instance norm": lambda: nn.InstanceNorm2d(4, momentum=None),
    "linear": lambda: nn.Linear(4, 6),
    "ghost": ghost,
    "cheap": lambda: ghost().cheap_operation,
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_as_they_are_built_fit(make):
    check_layer("a", make())


@pytest.mark.parametrize(
    ("layer", "name", "value"),
    [
        ("conv", "in_channels", None),
        ("conv", "out_channels", 7),
        ("conv", "out_channels", 6.0),
        ("conv", "groups", True),
        ("conv", "groups", [2]),
        ("conv", "kernel_size", (3, 3)),
        ("conv", "stride", (0, 1)),
        ("conv", "stride", Ellipsis),
        ("conv", "padding", "most"),
        ("conv", "padding_mode", "none"),
        ("conv", "weight", nn.Parameter(torch.ones(6, 4, 3, 1))),
        ("conv1d", "weight", nn.Parameter(torch.ones(6, 4, 3, 1))),
        ("transposed", "in_channels", 6),
        ("norm", "num_features", 3),
        ("norm", "eps", "small"),
        ("norm", "momentum", [0.1]),
        ("norm", "running_var", torch.ones(3)),
        ("linear", "in_features", 5),
        ("linear", "bias", nn.Parameter(torch.ones(1))),
        ("ghost", "order", torch.zeros(10, dtype=torch.int64)),
        ("ghost", "order", torch.arange(10).reshape(5, 2)),
        ("ghost", "cheap_operation", None),
        ("cheap", "ranges", 3),
        ("cheap", "ranges", ((0, 2),)),
        ("cheap", "convs", None),
    ],
)
def test_values_that_do_not_fit_are_refused(layer, name, value):
    module = LAYERS[layer]()
    if name in module._modules and value is None:
        del module._modules[name]
    else:
        setattr(module, name, value)
    with pytest.raises(GhostifyError, match=r"^module 'a': its values are not those of a "):
        check_layer("a", module)


def test_a_missing_value_is_refused():
    conv = nn.Conv2d(4, 6, 3)
    del conv.out_channels
    with pytest.raises(GhostifyError, match="not those of a Conv2d"):
        check_layer("a", conv)
