import types

import pytest
import torch
from torch import fx, nn

from ghostify.graph.symbolic_tracer import SymbolicTracer
from tests import nets


def traced(model, leaves=frozenset()):
    return fx.GraphModule(model, SymbolicTracer(leaves, {}, set()).trace_forward(model))


def test_the_forward_of_the_instance_is_traced():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), nets.images(1)
    model.forward = types.MethodType(lambda self, x: self[0](x) * 2, model)
    expected = model(x)
    del model.__dict__["forward"]
    halved = traced(model)(x)
    model.forward = types.MethodType(lambda self, x: self[0](x) * 2, model)
    graph = SymbolicTracer(set(), {}, set()).trace_forward(model)
    del model.__dict__["forward"]
    assert torch.equal(fx.GraphModule(model, graph)(x), expected)
    assert torch.equal(halved * 2, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_modules_with_hooks_and_scripted_modules_are_leaves():
    model = nn.Sequential(nn.Sequential(nn.ReLU()), torch.jit.script(nn.ReLU()))
    model[0].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    tracer = SymbolicTracer(set(), {}, set())
    assert [n.target for n in tracer.trace_forward(model).nodes if n.op == "call_module"] == ["0", "1"]


def test_a_mode_is_a_node_or_the_branch_that_is_given():
    class Branching(nn.Module):
        def forward(self, x):
            return (x * 2 if self.training else x) + self.training

    model = Branching().eval()
    for modes, operators in (({}, ["add"]), ({"": True}, ["mul", "add"])):
        tracer = SymbolicTracer(set(), modes, set())
        names = [n.name for n in tracer.trace_forward(model).nodes if n.op == "call_function"]
        assert (names, tracer.branches) == (operators, {""})


def test_an_error_names_the_module_that_does_not_trace():
    tracer = SymbolicTracer(set(), {}, set())
    with pytest.raises(fx.proxy.TraceError):
        tracer.trace_forward(nets.Stubborn())
    assert tracer.failed_path == "gate"
