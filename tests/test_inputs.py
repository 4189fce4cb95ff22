import pytest
import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from ghostify import GhostifyError, trace
from ghostify.graph.forward_graph import trace_graph
from ghostify.graph.inputs import (
    CallArguments,
    PlaceholderValues,
    as_arguments,
    bind_example,
    bind_inputs,
    call_model,
    tensor_leaves,
)
from tests import nets


def test_a_batch_is_a_tensor_a_tuple_or_keywords():
    x = torch.ones(1)
    assert as_arguments(x) == ((x,), {})
    assert as_arguments([x, 2]) == ((x, 2), {})
    assert as_arguments({"x": x}) == ((), {"x": x})
    assert as_arguments(None) == ((), {})


def test_placeholders_take_keywords_then_positions_then_defaults():
    module = trace(nets.settle(nets.Optional())).module
    x = nets.images(1)
    assert bind_inputs(module, (), {"x": x}).values == (x, None, 1.0)
    assert bind_inputs(module, (x, None), {"scale": 2.0}).values == (x, None, 2.0)
    with pytest.raises(GhostifyError, match="input 'x' is missing"):
        bind_inputs(module, (), {})


def test_labels_are_not_dropped_from_examples():
    wild, x = nets.settle(nets.Wild()), nets.images(2)
    assert len(bind_example(wild, (x, torch.ones(2))).args) == 2
    assert torch.equal(call_model(wild, bind_example(wild, x)), wild(x))


def test_starred_inputs_take_the_remaining_arguments():
    class Starred(torch.nn.Module):
        def forward(self, x, *more, **options):
            return x + sum(more) if more or options else x

    x = torch.ones(2)
    fixed = trace(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), Starred()), nets.images(1)).module
    assert bind_inputs(fixed, (x,), {}).values == (x,)
    flexible = fx.GraphModule(Starred(), trace_graph(Starred(), {"x"}))
    assert bind_inputs(flexible, (x, 2, 3), {"a": 1}).values == (x, (2, 3), {"a": 1})
    assert torch.equal(call_model(flexible, PlaceholderValues((x, (), {}))), x)
    with pytest.raises(GhostifyError, match=r"\*more was empty when the model was traced"):
        call_model(flexible, PlaceholderValues((x, (2,), {})))


def test_inputs_of_both_kinds_are_trees_of_tensors():
    x = torch.ones(2)
    for inputs in (PlaceholderValues((x, (2 * x, "text"))), CallArguments((x,), {"y": [2 * x]})):
        doubled = tree_map_only(torch.Tensor, lambda v: 2 * v, inputs)
        assert type(doubled) is type(inputs)
        assert all(torch.equal(a, 2 * b) for a, b in zip(tensor_leaves(doubled), tensor_leaves(inputs), strict=True))
        assert len(tensor_leaves(inputs)) == 2
