import json
import operator

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from ghostify import GhostifyError, trace
from ghostify.graph.deserialization import deserialize_module
from ghostify.graph.serialization import serialize_module
from tests import nets


def round_trip(module):
    data, tensors = serialize_module(module)
    return deserialize_module(json.loads(json.dumps(data)), {k: v.detach().clone() for k, v in tensors.items()})


class Everything(nn.Module):
    """Slices, dtypes, devices, keyword arguments, shapes, nested tuples."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(1, 3)
        self.act = nn.LeakyReLU(0.2)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.tied = nn.Linear(4, 4)
        self.twin = nn.Linear(4, 4)
        self.twin.weight = self.tied.weight

    def forward(self, x):
        b, c = x.shape[0], x.shape[1]
        x = self.act(self.norm(x))[:, :2, ::2, 1:] * self.scale
        x = F.pad(x.to(torch.float64), (0, 1), mode="constant", value=float("inf")).to(
            device="cpu", dtype=torch.float32
        )
        x = torch.clamp(x, max=5.0).reshape(b, -1)
        x = torch.cat([x, x.new_ones((b, 1))], dim=-1)
        first, second = torch.chunk(x[..., :4], 2, dim=1)
        x = torch.cat((second, first), 1)
        return {"out": self.twin(self.tied(x)), "pair": (x.mean(), operator.add(c, 1))}


def test_a_graph_of_all_kinds_of_arguments_survives():
    model = Everything()
    traced = fx.symbolic_trace(model)
    restored = round_trip(traced)
    x = torch.randn(2, 3, 8, 8)
    expected, outputs = traced(x), restored(x)
    assert torch.equal(expected["out"], outputs["out"])
    assert expected["pair"][1] == outputs["pair"][1]
    assert restored.twin.weight is restored.tied.weight
    assert list(restored.state_dict()) == list(traced.state_dict())  # torch 2.6 makes `scale` persistent
    assert restored.act.negative_slope == 0.2


@pytest.mark.parametrize("make", nets.ALL[:5], ids=lambda c: c.__name__)
def test_state_dict_and_modes_survive(make):
    model = trace(nets.settle(make())).module
    model.stem.train()
    restored = round_trip(model)
    assert list(restored.state_dict()) == list(model.state_dict())
    assert {n: m.training for n, m in restored.named_modules()} == {n: m.training for n, m in model.named_modules()}


def test_values_that_json_cannot_express_are_named():
    with_hooks = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with_hooks.get_submodule("0").register_forward_hook(lambda *_: None)
    with pytest.raises(GhostifyError, match="0: has hooks"):
        serialize_module(with_hooks)
    with_object = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with_object.get_submodule("0").secret = object()
    with pytest.raises(
        GhostifyError, match=r"0\.secret: a value of class object cannot be saved\. Remove the attribute"
    ):
        serialize_module(with_object)

    class Local(nn.Conv2d):
        pass

    Local.__module__ = "torch.nn.fake"
    local = fx.symbolic_trace(nn.Sequential(Local(3, 4, 3)))
    with pytest.raises(GhostifyError, match=r"0: its class: .* cannot be imported by that name"):
        serialize_module(local)
