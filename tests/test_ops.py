import operator

import pytest
import torch
from timm.layers import AvgPool2dSame, BatchNormAct2d, Conv2dSame, StdConv2d
from timm.layers.pool2d_same import MaxPool2dSame
from torch import fx, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth, stochastic_depth

from ghostify.graph.batchnorm import batchnorm_affine, batchnorm_at, batchnorm_of, has_running_statistics
from ghostify.graph.op_queries import (
    activation_input,
    activation_module,
    channel_parameters,
    concat_inputs,
    elementwise_operands,
    is_add,
    is_channel_independent,
    is_channelwise,
    is_conv2d,
    is_depthwise,
    is_identity_in_eval,
    is_mul,
    is_pooling,
    is_standard_conv,
    may_mutate_input,
    reads_metadata,
)
from ghostify.graph.ops import OPS, op_of
from ghostify.modules.hooks import has_hooks

CHANNELS = 6
ARGUMENTS = {
    "threshold": (0.1, -1.0), "clamp": (-0.5, 0.5), "pow": (2,), "max_pool": (2,), "avg_pool": (2,), "lp_pool": (2, 2),
    "adaptive_avg_pool": (2,), "adaptive_max_pool": (2,), "spatial_mean": ((2, 3), True), "spatial_max": ((2, 3), True),
    "upsample": (None, 2), "pad": ((1, 1, 2, 2),),
}  # fmt: skip
FUNCTION_ARGUMENTS = {
    "dropout": (0.5, False), "alpha_dropout": (0.5, False), "drop_path": (0.5, False),
    "stochastic_depth": (0.5, "row", False),
}  # fmt: skip
MODULE_ARGUMENTS = {
    AvgPool2dSame: (2, 2),
    MaxPool2dSame: (2, 2),
    nn.ConstantPad2d: (1, 0.5),
    StochasticDepth: (0.5, "row"),
}
CHANNEL_INDEPENDENT = [op for op in OPS if op.channel_independent]


def one_call(kind, target, args):
    """A graph that calls one operator on its input."""
    graph = fx.Graph()
    called, args = ("inner", ()) if kind == "call_module" else (target, args)
    graph.output(graph.create_node(kind, called, (graph.placeholder("x"), *args)))
    return fx.GraphModule({"inner": target} if kind == "call_module" else {}, graph).eval()


def forms(ops):
    """Graphs of one call each, for every module, function and method of these operators."""
    params = []
    for op in ops:
        args = ARGUMENTS.get(op.name, ())
        calls = [
            *((cls.__name__, "call_module", cls(*MODULE_ARGUMENTS.get(cls, args)), ()) for cls in op.modules),
            *((f.__name__, "call_function", f, FUNCTION_ARGUMENTS.get(op.name, args)) for f in op.functions),
            *((f"method {m}", "call_method", m, (torch.float64,) if m == "to" else args) for m in op.methods),
        ]
        params += [pytest.param(op, one_call(*call), id=f"{op.name}-{name}") for name, *call in calls]
    return params


def node_of(module):
    return next(n for n in module.graph.nodes if n.op.startswith("call"))


def values():
    return torch.rand(2, CHANNELS, 5, 7, generator=torch.Generator().manual_seed(0)) + 0.1


def graph_of(forward, **attributes):
    """The graph of a function, or of `forward(self, ...)` of a module with these attributes, and its last operation."""
    model = type("Model", (nn.Module,), {"forward": forward})() if attributes else forward
    for name, value in attributes.items():
        setattr(model, name, value)
    module = fx.symbolic_trace(model)
    return module, list(module.graph.nodes)[-2]


def test_no_form_belongs_to_two_operators():
    for kind in ("modules", "functions", "methods"):
        listed = [form for op in OPS for form in set(getattr(op, kind))]
        duplicates = {form for form in listed if listed.count(form) > 1}
        assert not duplicates, kind


@pytest.mark.parametrize(("op", "module"), forms(CHANNEL_INDEPENDENT))
def test_every_form_is_recognised_and_is_channel_independent(op, module):
    node = node_of(module)
    assert op_of(module, node) is op
    assert is_channel_independent(module, node)
    assert channel_parameters(module, node) == ()
    permutation, x = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(1)), values()
    torch.testing.assert_close(module(x[:, permutation].clone()), module(x.clone())[:, permutation])


@pytest.mark.parametrize(("op", "module"), forms(CHANNEL_INDEPENDENT))
def test_an_operator_that_does_not_mutate_its_input_allocates_its_output(op, module):
    x = values()
    before = x.clone()
    result = module(x)
    if not may_mutate_input(module, node_of(module)):
        assert torch.equal(x, before)
        assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    elif op.allocates:
        assert result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize(("op", "module"), forms([op for op in OPS if op.identity_in_eval]))
def test_an_identity_in_evaluation_returns_its_input(op, module):  # noqa: ARG001
    x = values()
    assert is_identity_in_eval(module, node_of(module))
    assert torch.equal(module(x.clone()), x)


@pytest.mark.parametrize(("op", "module"), forms([op for op in OPS if op.activation and op.channel_independent]))
def test_an_activation_module_computes_what_the_call_does(op, module):  # noqa: ARG001
    activation, x = activation_module(module, node_of(module)), values() - 0.5
    torch.testing.assert_close(activation(x.clone()), module(x.clone()))


@pytest.mark.parametrize(("op", "module"), forms([op for op in OPS if op.pools]))
def test_all_forms_of_pooling_pool(op, module):  # noqa: ARG001
    assert is_pooling(module, node_of(module))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.leaky_relu(x, 0.3),
        lambda x: F.leaky_relu(x, negative_slope=0.3, inplace=True),
        lambda x: F.elu(x, alpha=0.5),
        lambda x: F.relu(x, True),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: F.hardtanh(x, -2, 2),
        lambda x: F.softplus(x, 2.0),
        lambda x: x.clamp(min=0),
        lambda x: torch.clamp(x, -1, max=1),
        lambda x: x * torch.sigmoid(x),
        lambda x: x.sigmoid() * x,
        lambda x: x * F.hardsigmoid(x),
    ],
)
def test_arguments_of_activation_functions_count(call):
    module, node = graph_of(call)
    x = torch.randn(2, 3, 4, 4)
    activation = activation_module(module, node)
    before = x.clone()
    torch.testing.assert_close(activation(x), call(before.clone()))
    assert torch.equal(x, before)
    assert activation_input(module, node).op == "placeholder"


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: x * torch.sigmoid(y),
        lambda x, y: torch.sigmoid(x) * torch.sigmoid(x) * y,
        lambda x, y: F.leaky_relu(x, y),
        lambda x, y: torch.clamp(x, min=y),
        lambda x, y: x.clamp(1, 1),  # noqa: ARG005
        lambda x, y: x + 1,  # noqa: ARG005
    ],
)
def test_other_calls_are_not_activations(call):
    module, node = graph_of(call)
    assert activation_module(module, node) is None


def test_a_gate_with_other_users_is_not_part_of_an_activation():
    def forward(x):
        gate = torch.sigmoid(x)
        return x * gate + gate

    module, _ = graph_of(forward)
    product = next(n for n in module.graph.nodes if is_mul(n))
    assert activation_module(module, product) is None


def test_prelu_has_channel_parameters_in_all_forms():
    x = torch.randn(2, 3, 4, 4)
    modules = [
        graph_of(lambda self, x: self.act(x), act=nn.PReLU(3)),
        graph_of(lambda self, x: F.prelu(x, self.slope), slope=nn.Parameter(torch.full((3,), 0.25))),
        graph_of(lambda self, x: x.prelu(self.slope), slope=nn.Parameter(torch.full((3,), 0.25))),
    ]
    paths = [channel_parameters(module, node) for module, node in modules]
    assert paths == [("act.weight",), ("slope",), ("slope",)]
    for module, node in modules:
        assert is_channelwise(module, node)
        assert not is_channel_independent(module, node)
        assert torch.equal(activation_module(module, node)(x), module(x))


def test_one_slope_for_all_channels_is_channel_independent():
    for module, node in (
        graph_of(lambda self, x: self.act(x), act=nn.PReLU()),
        graph_of(lambda self, x: F.prelu(x, self.slope), slope=nn.Parameter(torch.full((1,), 0.25))),
    ):
        assert is_channel_independent(module, node)


def test_a_computed_slope_is_unsupported():
    module, node = graph_of(lambda x, y: F.prelu(x, y))
    assert not is_channelwise(module, node)
    assert activation_module(module, node) is None


def test_a_norm_is_channelwise_with_the_activation_in_it():
    norm = BatchNormAct2d(4, act_layer=nn.PReLU, act_kwargs={"num_parameters": 4})
    module = one_call("call_module", norm, ())
    assert is_channelwise(module, node_of(module))
    names = ("weight", "bias", "running_mean", "running_var", "act.weight")
    assert set(channel_parameters(module, node_of(module))) == {f"inner.{name}" for name in names}
    assert batchnorm_of(module, node_of(module)) is module.inner
    module = one_call("call_module", BatchNormAct2d(4, act_layer=nn.Softmax2d), ())
    assert not is_channelwise(module, node_of(module))


def test_a_norm_without_parameters_is_channel_independent():
    module, node = graph_of(lambda self, x: self.norm(x), norm=nn.InstanceNorm2d(4))
    assert is_channel_independent(module, node)
    module, node = graph_of(lambda self, x: self.norm(x), norm=nn.InstanceNorm2d(4, affine=True))
    assert channel_parameters(module, node) == ("norm.weight", "norm.bias")


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.SyncBatchNorm(4)])
def test_scale_and_shift_equal_the_norm_in_evaluation(norm):
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        if tensor is not None:
            nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    scale, shift = batchnorm_affine(norm)
    expected = F.batch_norm(
        x,
        *(None if t is None else t.double() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)),
        eps=norm.eps,
    )
    torch.testing.assert_close(x * scale[:, None, None] + shift[:, None, None], expected)


def test_norms_with_running_statistics():
    assert has_running_statistics(nn.BatchNorm1d(3))
    assert has_running_statistics(nn.InstanceNorm2d(3, track_running_stats=True))
    assert not has_running_statistics(nn.InstanceNorm2d(3))
    assert not has_running_statistics(nn.GroupNorm(1, 3))


def test_only_batch_norms_over_maps_count_as_following_norms():
    holder = nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.GroupNorm(1, 3)})
    assert batchnorm_at(holder, "a") is holder["a"]
    assert batchnorm_at(holder, None) is None
    module, node = graph_of(lambda self, x: self.norm(x), norm=nn.GroupNorm(1, 3))
    assert batchnorm_of(module, node) is None


def test_a_dropout_in_training_mode_is_not_identity():
    for call in (lambda x: F.dropout(x, 0.5), lambda x: F.dropout(x, 0.5, True)):
        module, node = graph_of(call)
        assert not is_identity_in_eval(module, node)
    module, node = graph_of(lambda x: stochastic_depth(x, 0.5, "row"))
    assert not is_identity_in_eval(module, node)


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_of_every_kind_count(register):
    module, node = graph_of(lambda self, x: self.act(x), act=nn.ReLU())
    assert not has_hooks(module.act)
    handle = register(module.act)
    assert has_hooks(module.act)
    assert not is_channel_independent(module, node)
    assert activation_module(module, node) is None
    assert may_mutate_input(module, node)
    handle.remove()
    assert is_channel_independent(module, node)
    module, node = graph_of(lambda self, x: self.drop(x), drop=nn.Dropout())
    register(module.drop)
    assert not is_identity_in_eval(module, node)


class Flipped(nn.ReLU):
    def forward(self, x):
        return x.flip(1)


def test_a_subclass_with_a_forward_of_its_own_is_another_operator():
    module = one_call("call_module", Flipped(), ())
    assert op_of(module, node_of(module)) is None
    patched = nn.ReLU()
    patched.forward = lambda x: x.flip(1)
    module = one_call("call_module", patched, ())
    assert op_of(module, node_of(module)) is None


def test_convolutions_of_all_kinds():
    for conv in (StdConv2d(4, 4, 3), nn.Conv2d(4, 4, 3)):
        module = one_call("call_module", conv, ())
        assert is_conv2d(module, node_of(module))
    module, node = graph_of(lambda self, x: F.conv2d(x, self.weight), weight=nn.Parameter(torch.ones(4, 4, 3, 3)))
    assert is_conv2d(module, node)
    module, node = graph_of(lambda self, x: F.linear(x, self.weight), weight=nn.Parameter(torch.ones(4, 4)))
    assert not is_conv2d(module, node)
    assert is_standard_conv(nn.Conv2d(4, 4, 1))
    assert is_standard_conv(Conv2dSame(4, 4, 1))
    assert not is_standard_conv(StdConv2d(4, 4, 1))
    assert is_depthwise(nn.Conv2d(4, 4, 3, groups=4))
    assert not any(is_depthwise(nn.Conv2d(a, b, 3, groups=g)) for a, b, g in ((4, 8, 4), (4, 4, 2), (1, 1, 1)))


@pytest.mark.parametrize(
    ("call", "operands"),
    [
        (lambda x, y: x + y, 2), (lambda x, y: torch.sub(x, other=y), 2), (lambda x, y: x.mul_(y), 2),
        (lambda x, y: operator.itruediv(x, y), 2), (lambda x, y: torch.maximum(x, y), 2), (lambda x, _: 1 - x, 1),
        (lambda x, _: x / 6.0, 1), (lambda x, _: torch.relu(x), None),
    ],
)  # fmt: skip
def test_operands_of_elementwise_operations(call, operands):
    module, node = graph_of(call)
    operand_nodes = elementwise_operands(node)
    assert (None if operand_nodes is None else len(operand_nodes)) == operands
    if operands is not None:
        assert is_channel_independent(module, node) == (operands == 1)


def test_sums_and_products_are_of_two_values():
    calls = {
        is_add: [
            lambda x, y: x + y,
            lambda x, y: torch.add(x, y),
            lambda x, y: x.add_(y),
            lambda x, y: operator.iadd(x, y),
        ],
        is_mul: [
            lambda x, y: x * y,
            lambda x, y: torch.mul(x, y),
            lambda x, y: x.mul(y),
            lambda x, y: operator.imul(x, y),
        ],
    }
    for query, functions in calls.items():
        for function in functions:
            _, node = graph_of(function)
            assert query(node)
    others = [lambda x, _: x + 1, lambda x, y: torch.add(x, y, alpha=2), lambda x, _: x * 2, lambda x, y: x - y]
    for function in others:
        _, node = graph_of(function)
        assert not is_add(node)
        assert not is_mul(node)


@pytest.mark.parametrize(
    ("call", "by_channel"),
    [
        (lambda x, y: torch.cat((x, y), 1), True), (lambda x, y: torch.cat([x, y], dim=-3), True),
        (lambda x, y: torch.concat(tensors=(x, y), dim=1), True), (lambda x, y: torch.cat((x, y), axis=1), True),
        (lambda x, y: torch.cat((x, y)), False), (lambda x, y: torch.cat((x, y), 2), False),
        (lambda x, y: torch.add(x, y), False),
    ],
)  # fmt: skip
def test_concatenation_along_channels(call, by_channel):
    _, node = graph_of(call)
    inputs = concat_inputs(node)
    assert (None if inputs is None else [n.name for n in inputs]) == (["x", "y"] if by_channel else None)


def test_padding_of_positions_only_is_channel_independent():
    for pad, expected in (((1, 1), True), ((1, 1, 1, 1), True), ((0, 0, 0, 0, 1, 1), False)):
        module = one_call("call_function", F.pad, (pad,))
        assert is_channel_independent(module, node_of(module)) == expected


def test_reading_metadata_is_not_reading_values():
    for read in (lambda x: x.shape, lambda x: x.size(1), lambda x: x.dim(), lambda x: x.dtype):
        _, node = graph_of(read)
        assert reads_metadata(node)
    for read in (lambda x: x.T, lambda x: x.sum()):
        _, node = graph_of(read)
        assert not reads_metadata(node)


def test_unknown_operators_and_views_may_mutate_their_input():
    for call in (lambda x: x.flatten(1), lambda x: torch.sort(x), lambda x: x.add_(1), lambda x: F.relu(x, True)):
        module, node = graph_of(call)
        assert may_mutate_input(module, node)
    module = one_call("call_module", BatchNormAct2d(3), ())
    assert may_mutate_input(module, node_of(module))  # its activation is in place
    module, node = graph_of(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 3, 1))
    assert not may_mutate_input(module, node)
