import pytest
from torch import nn

from ghostify.tracer import UntraceableError, graph_of
from tests import nets


def test_a_forward_with_control_flow_has_no_graph():
    with pytest.raises(UntraceableError, match="control flow"):
        graph_of(nets.Stubborn.Gate(3), set())


def test_what_does_not_trace_inside_is_a_leaf():
    targets = [n.target for n in graph_of(nets.Stubborn(), set()).nodes if n.op == "call_module"]
    assert "gate" in targets
    assert not any("gate." in str(t) for t in targets)


def test_arguments_that_are_given_stay_inputs():
    class Scaled(nn.Module):
        def forward(self, x, scale=1.0):
            return x * scale

    guarded, free = ([n.name for n in graph_of(Scaled(), given).nodes] for given in (set(), {"scale"}))
    assert "fixed" in guarded
    assert "fixed" not in free
