import pytest
import torch
from torch import fx, nn

from ghostify.graph.forward_graph import trace_graph
from ghostify.graph.symbolic_tracer import UntraceableError
from tests import nets


def test_a_forward_with_control_flow_has_no_graph():
    with pytest.raises(UntraceableError, match="control flow"):
        trace_graph(nets.Stubborn.Gate(3), set())


def test_a_submodule_that_does_not_trace_is_a_leaf():
    targets = [n.target for n in trace_graph(nets.Stubborn(), set()).nodes if n.op == "call_module"]
    assert "gate" in targets
    assert not any("gate." in str(t) for t in targets)


def test_named_optional_arguments_stay_inputs():
    class Scaled(nn.Module):
        def forward(self, x, scale=1.0):
            return x * scale

    guarded, free = ([n.name for n in trace_graph(Scaled(), names).nodes] for names in (set(), {"scale"}))
    assert "check_default_argument" in guarded
    assert "check_default_argument" not in free


def test_caches_that_a_forward_fills_hold_no_proxies_afterwards():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.inner, self.bias = nn.Conv2d(3, 4, 1), nets.Stubborn.Gate(4), nn.Parameter(torch.ones(4, 1))
            self.cache, self.inputs, self.last = {}, [], None

        def forward(self, x):
            if "bias" not in self.cache:
                self.cache["bias"] = self.bias[:, None]
            self.inputs.append(x)
            self.last = self.new = x
            return self.inner(self.conv(x) + self.cache["bias"]) + torch.ones(1)

    model, x = Caching().eval(), torch.rand(1, 3, 4, 4)
    graph = trace_graph(model, set())
    assert (model.cache, model.inputs, model.last) == ({}, [], None)
    assert not hasattr(model, "new")
    graph.lint()
    assert torch.equal(fx.GraphModule(model, graph)(x), model(x))
