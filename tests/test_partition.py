import inspect

import pytest
import torch
from timm.layers import register_notrace_module
from torch import fx, nn

from ghostify.graph.inputs import CallArguments
from ghostify.graph.partition import (
    contains_convs,
    models_match,
    record_first_calls,
    tensor_arguments,
    trace_submodules,
)
from ghostify.graph.symbolic_tracer import UntraceableError
from tests import nets


def test_inner_subgraphs_come_before_outer_ones():
    module, subgraphs, reason = trace_submodules(nets.settle(nets.Stubborn()), {})
    assert list(subgraphs) == ["gate.conv", ""]
    assert isinstance(module, fx.GraphModule)
    assert reason == ""


def test_a_module_that_does_not_trace_keeps_its_class_and_the_reason_is_returned():
    model = nets.settle(nets.Wild())
    signatures = record_first_calls(model, CallArguments((nets.images(1),), {}))
    module, subgraphs, reason = trace_submodules(model, signatures)
    assert module is model
    assert set(subgraphs) == {"backbone", "gate.conv", "head"}
    assert "Error" in reason


def test_a_module_is_traced_as_its_graph_calls_it_or_not_where_its_optional_arguments_are_not_known():
    _, by_python, _ = trace_submodules(nets.settle(nets.Wild()), {})
    assert set(by_python) == {"backbone", "gate.conv"}

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = nets.settle(nets.Optional()), nets.settle(nets.Optional())

        def forward(self, x):
            return self.inner(x, bias=x.mean()), self.other(x)

    model, x = Outer().eval(), nets.images(1)
    for inner in (model.inner, model.other):
        inner.register_forward_hook(lambda *_: None)
    expected = model(x)
    module, by_graph, _ = trace_submodules(model, {})
    assert list(by_graph) == ["inner", "other", ""]
    assert all(map(torch.equal, module(x), expected))


@register_notrace_module
class NotTraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nets.conv_norm(8, 8)

    def forward(self, x):
        return self.inner(x)


def test_children_of_a_module_that_timm_marks_are_traced():
    _, subgraphs, _ = trace_submodules(nn.Sequential(nn.Conv2d(3, 8, 3), NotTraceable()).eval(), {})
    assert list(subgraphs) == ["1.inner", ""]


def test_a_module_at_two_paths_is_one_subgraph():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = NotTraceable()
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x) if x.sum() > 0 else x)

    module, subgraphs, _ = trace_submodules(Twice().eval(), {})
    assert list(subgraphs) == ["a.inner"]
    assert module.a.inner is module.b.inner


def test_flags_off_their_defaults_are_not_traced():
    def forward(x, mask=None, deep=False):
        return x if deep else mask

    signature = inspect.signature(forward)
    assert tensor_arguments(signature.bind(1, deep=False)) == {"x"}
    assert tensor_arguments(signature.bind(1, torch.ones(1))) == {"x", "mask"}
    with pytest.raises(UntraceableError, match="deep=True"):
        tensor_arguments(signature.bind(1, deep=True))


def test_only_single_convolutions_are_traced_on_demand():
    _, subgraphs, _ = trace_submodules(nets.settle(nets.Wild()), {}, whole=False)
    assert list(subgraphs) == ["backbone.stem.0", "backbone.a.0", "gate.conv"]


def test_calls_before_an_error_in_the_forward_are_recorded():
    model = nets.settle(nets.Wild())
    calls = record_first_calls(model, CallArguments((nets.images(1),), {}))
    assert list(calls[id(model.head)].arguments) == ["x"]
    assert record_first_calls(model, CallArguments((torch.zeros(1, 5, 4, 4),), {}))
    assert not model.backbone._forward_pre_hooks


def test_models_with_different_outputs_do_not_match():
    model, x = nets.settle(nets.Straight()), CallArguments((nets.images(2),), {})
    other = nets.settle(nets.Straight(), seed=5)
    assert models_match(model, x, model, x)
    assert not models_match(model, x, other, x)


def test_weights_of_functional_convolutions_count():
    assert contains_convs(nets.Wild.Head(4))
    assert not contains_convs(nn.Linear(3, 3))
