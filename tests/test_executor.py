import pytest
import torch
from torch import Tensor, fx

from ghostify import trace
from ghostify.graph.executor import execute, last_uses, resume
from ghostify.graph.inputs import bind_inputs
from tests import nets


@pytest.mark.parametrize("make", nets.ALL, ids=lambda c: c.__name__)
def test_a_graph_executed_node_by_node_computes_what_the_module_does(make):
    module, x = trace(nets.settle(make())).module, nets.images(3)
    with torch.no_grad():
        assert torch.equal(execute(module, bind_inputs(module, (x,), {}).values), module(x))


def test_the_callback_gets_every_node_in_order_and_replaces_values():
    module, x = trace(nets.settle(nets.Residual())).module, nets.images(2)
    visited = []

    def on_node(node, value, values):
        visited.append(node)
        assert all(source in values for source in node.all_input_nodes)
        return value + 1 if node.op == "output" else value

    with torch.no_grad():
        assert torch.equal(execute(module, [x], on_node), module(x) + 1)
    assert visited == list(module.graph.nodes)


def test_values_are_freed_after_their_last_use():
    module = trace(nets.settle(nets.Straight())).module
    max_live = 0

    def on_node(_, value, values):
        nonlocal max_live
        max_live = max(max_live, len(values))
        return value

    execute(module, [nets.images(2)], on_node)
    assert max_live <= 2
    assert sorted(n.name for nodes in last_uses(module.graph).values() for n in nodes) == sorted(
        n.name for n in module.graph.nodes
    )


def test_starred_inputs_are_passed_to_their_placeholders():
    class Several(torch.nn.Module):
        def forward(self, x: Tensor, *more: Tensor, **named: Tensor):
            return x + more[0] * named["scale"]

    module, x = fx.symbolic_trace(Several()), torch.ones(2)
    assert torch.equal(execute(module, [x, (2 * x,), {"scale": 3 * x}]), 7 * x)


def test_a_run_that_resumes_with_another_value_leaves_the_others_as_they_are():
    """Activations and sum of this network write in place."""
    module, x, outputs = trace(nets.settle(nets.Residual())).module, nets.images(2), {}

    def on_node(node, value, values):
        outputs[node.name] = resume(module, node, value if node.op == "output" else value * 2, values)
        return value

    def doubled(changed):
        return lambda node, value, _: value * 2 if node.name == changed and node.op != "output" else value

    with torch.no_grad():
        assert torch.equal(execute(module, [x.clone()], on_node), module(x))
        for name, output in outputs.items():
            assert torch.equal(output, execute(module, [x.clone()], doubled(name))), name
