import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from ghostify import GhostifyError, trace
from tests import nets


@pytest.mark.parametrize("make", nets.ALL, ids=lambda c: c.__name__)
def test_a_traced_copy_computes_what_the_model_does_in_both_modes(make):
    model, x = nets.settle(make()), nets.images()
    program = trace(model, x)
    assert torch.equal(program.module(x), model(x))
    torch.manual_seed(3)
    expected = copy.deepcopy(model).train()(x)
    torch.manual_seed(3)
    assert torch.equal(program.module.train()(x), expected)


def test_every_convolution_is_listed_once_with_shapes_and_macs():
    program = trace(nets.settle(nets.Straight()), nets.images(2))
    assert [c.name for c in program.convolutions] == ["stem.0", "a.0", "b.0"]
    last = program.convolutions[-1]
    assert (last.inputs, last.outputs, last.kernel, last.bias) == (16, 16, (3, 3), False)
    assert last.calls[0].output_shape == (2, 16, 6, 6)
    assert program.macs == 2 * (144 * (8 * 27 + 16 * 72) + 36 * 16 * 144 + 16 * 5)


def test_a_shared_convolution_is_listed_once_with_both_calls():
    program = trace(nets.settle(nets.Shared()))
    assert [len(c.calls) for c in program.convolutions] == [1, 2]


def test_functional_convolutions_are_named_by_their_weight():
    program = trace(nets.settle(nets.Functional()), nets.images(1))
    named = {c.name: c for c in program.convolutions}
    assert named["kernel"].is_functional
    assert named["kernel"].unsupported_reason is None
    assert program.conv("kernel").stride == (2, 2)
    computed = [c for c in program.convolutions if c.unsupported_reason]
    assert [c.unsupported_reason for c in computed] == ["weight computed in the forward"]


def test_one_weight_in_two_calls_is_one_convolution_if_the_calls_agree():
    class Twice(nn.Module):
        def __init__(self, second):
            super().__init__()
            self.kernel, self.second = nn.Parameter(torch.randn(8, 8, 3, 3)), second

        def forward(self, x):
            x = F.conv2d(x, self.kernel, padding=1)
            return F.conv2d(x, self.kernel, padding=self.second)

    (equal,), (different,) = (trace(Twice(padding)).convolutions for padding in (1, 2))
    assert len(equal.calls) == len(different.calls) == 2
    assert equal.unsupported_reason is None
    assert "different strides, paddings" in different.unsupported_reason


def test_a_convolution_in_a_module_that_does_not_trace_is_a_subgraph_by_itself():
    model, x = nets.settle(nets.Stubborn()), nets.images(1)
    program = trace(model, x)
    assert list(program.subgraphs) == ["gate.conv", ""]
    gate = next(c for c in program.convolutions if c.name == "gate.conv")
    assert (gate.subgraph_path, gate.local_path, gate.unsupported_reason) == ("gate.conv", "conv", None)
    assert gate.calls[0].output_shape == (1, 8, 12, 12)
    assert program.conv("gate.conv") is program.module.gate.conv


def test_a_model_that_does_not_trace_keeps_its_class_around_its_subgraphs():
    model, x = nets.settle(nets.Wild()), nets.images(2)
    program = trace(model, x)
    assert list(program.subgraphs) == ["backbone", "head", "gate.conv"]
    assert isinstance(program.module, nets.Wild)
    assert isinstance(program.module.backbone, fx.GraphModule)
    assert [c.name for c in program.convolutions] == ["backbone.stem.0", "backbone.a.0", "head.weight", "gate.conv"]
    assert torch.equal(program.module(x), model(x))
    head = next(c for c in program.convolutions if c.subgraph_path == "head")
    assert head.calls[0].output_positions == 2 * (144 + 36)


def test_a_submodule_called_with_options_is_traced_as_it_is_called():
    class Options(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nets.Optional()

        def forward(self, x):
            x = x if x.mean() > 100 else x + 1
            return self.inner(x, bias=x.mean(), scale=2.0)

    model, x = nets.settle(Options()), nets.images(1)
    program = trace(model, x)
    assert list(program.subgraphs) == ["inner"]
    torch.testing.assert_close(program.module(x), model(x))
    torch.testing.assert_close(trace(model).module(x), model(x))


def test_a_convolution_that_never_runs_is_listed_with_the_reason():
    (conv,) = trace(nets.Stubborn.Gate(3), -torch.ones(1, 3, 4, 4)).convolutions
    assert conv.unsupported_reason == "not called when the example inputs run"
    model = nets.settle(nets.Straight())
    model.spare = nn.Conv2d(3, 3, 1)
    spare = next(c for c in trace(model).convolutions if c.name == "spare")
    assert (spare.calls, spare.unsupported_reason) == ((), "not called in the traced forward")


def test_optional_arguments_that_are_left_out_are_checked():
    model, x = nets.settle(nets.Optional()), nets.images(1)
    program = trace(model, x)
    with pytest.raises(GhostifyError, match="argument 'bias' was fixed at its default None"):
        program.module(x, torch.ones(1))
    program = trace(model, {"x": x, "bias": torch.ones(1)})
    assert torch.equal(program.module(x, torch.ones(1) * 3), model(x, torch.ones(1) * 3))


def test_a_convolution_with_hooks_is_unsupported():
    model = nets.settle(nets.Straight())
    model.a[0].register_forward_hook(lambda *_: None)
    conv = next(c for c in trace(model).convolutions if c.name == "a.0")
    assert conv.unsupported_reason == "has hooks"


def test_a_convolution_with_a_tied_weight_is_unsupported():
    model = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])
    model[2].weight = model[1].weight
    reasons = {c.name: c.unsupported_reason for c in trace(model).convolutions}
    assert reasons["0"] is None
    assert reasons["1"] == "weight shared with another module or call"
    assert reasons["2"] == reasons["1"]


def test_a_model_that_cannot_be_traced_or_run_is_an_error():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(GhostifyError, match=r"Branching\.forward cannot be traced \(.*control flow"):
        trace(Branching())
    with pytest.raises(GhostifyError, match="example_inputs: the model does not run on them"):
        trace(nets.Straight(), torch.zeros(1, 7, 8, 8))
    with pytest.raises(GhostifyError, match="lazy"):
        trace(nn.Sequential(nn.LazyConv2d(4, 3)))
    with pytest.raises(GhostifyError, match="input 'x' is missing"):
        trace(nets.Straight(), {})


def test_tracing_leaves_module_attributes_as_they_were():
    trace(nets.settle(nets.Residual()))
    assert "training" not in vars(nn.Module)


class Auxiliary(nn.Module):
    """Returns one output more in training where `auxiliary`."""

    def __init__(self, auxiliary=True):
        super().__init__()
        self.conv, self.auxiliary = nn.Conv2d(3, 4, 3), auxiliary

    def forward(self, x):
        x = self.conv(x)
        return (x, x.mean()) if self.training and self.auxiliary else x


@pytest.mark.parametrize("mode", [True, False])
def test_a_forward_that_depends_on_its_mode_keeps_its_class(mode):
    x, model = nets.images(1), Auxiliary()
    program = trace(nn.Sequential(model, Auxiliary(auxiliary=False)).train(mode)[:1])
    assert list(program.subgraphs) == ["0.conv", ""]
    module = program.module
    assert torch.equal(module.eval()(x), model.eval()(x))
    assert all(map(torch.equal, module.train()(x), model.train()(x)))


def test_a_forward_that_is_the_same_in_both_modes_has_a_graph_without_its_mode():
    program = trace(Auxiliary(auxiliary=False))
    assert [n.op for n in program.module.graph.nodes] == ["placeholder", "call_module", "output"]


def test_a_layer_without_convolutions_that_branches_on_its_mode_is_a_leaf():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x) if self.training else x

    program = trace(nn.Sequential(nn.Conv2d(3, 4, 3), Noise(), nn.Conv2d(4, 4, 3)).eval(), nets.images(1))
    assert [c.unsupported_reason for c in program.convolutions] == [None, None]
    assert torch.equal(program.module(nets.images(1)), program.module(nets.images(1)))
    program.module.train()
    assert not torch.equal(program.module(nets.images(1)), program.module(nets.images(1)))


def test_a_model_that_stores_a_tensor_of_its_last_forward_is_copied():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.cache = nn.Conv2d(3, 4, 3), {}

        def forward(self, x):
            self.cache["bias"] = self.conv.bias * 2
            return self.conv(x)

    model = Caching()
    model(nets.images(1))
    assert len(trace(model).convolutions) == 1
    assert model.cache["bias"].requires_grad


def test_the_error_of_a_forward_is_reported_in_one_line():
    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            raise RuntimeError(f"no such sensor: {x.dim()}")

    with pytest.raises(GhostifyError, match=r"does not run on them \(RuntimeError: no such sensor: 4\)\. Pass inputs"):
        trace(Raises(), nets.images(1))


def test_a_model_that_calls_itself_is_traced_or_refused():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.depth = nn.Conv2d(3, 3, 3, padding=1), 3

        def forward(self, x, depth=None):
            depth = self.depth if depth is None else depth
            return x if depth == 0 else self(self.conv(x), depth - 1)

    class Endless(Recursive):
        def forward(self, x):
            return self(self.conv(x))

    x = nets.images(1)
    model = Recursive()
    program = trace(model, x)
    assert torch.equal(program.module(x), model(x))
    assert len(program.convolutions[0].calls) == 3
    with pytest.raises(GhostifyError, match="does not run"):
        trace(Endless(), x)


def test_circular_references_are_traced_unless_they_are_registered_submodules():
    model = nets.settle(nets.Wild())
    model.gate.owner = [model]
    program = trace(model, nets.images(1))
    assert [c.subgraph_path for c in program.convolutions] == ["backbone", "backbone", "head", "gate.conv"]
    model.gate.registered = model
    with pytest.raises(GhostifyError, match=r"gate\.registered: the module contains itself as a submodule"):
        trace(model, nets.images(1))


def test_a_graph_that_depends_on_the_size_is_traced_for_the_example():
    class Sizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.a(x) if x.shape[-1] > 16 else self.b(x)

    program = trace(Sizes(), nets.images(1, 12))
    reasons = {c.name: c.unsupported_reason for c in program.convolutions}
    assert reasons["a"] == "not called when the example inputs run"
    assert reasons["b"] is None
    large = nets.images(1, 20)
    assert program.module(large).shape == (1, 4, 18, 18)


def test_functional_convolutions_in_a_forward_that_does_not_trace_are_listed():
    model, x = nets.settle(nets.FunctionalUntraced()), nets.images(2)
    with pytest.warns(UserWarning, match=r"1 functional convolutions run in forwards .* The first is weight\."):
        program = trace(model, x)
    (conv,) = [c for c in program.convolutions if c.name == "weight"]
    assert (conv.inputs, conv.outputs, conv.kernel, conv.is_functional) == (8, 6, (3, 3), True)
    assert conv.unsupported_reason == "functional call in a forward that does not trace"
