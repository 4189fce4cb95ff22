import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from ghostify import GhostifyError, Policy, Rule, fit, ghostify, plan, rewrite, trace
from ghostify.modules.ghost import GhostModule
from tests import nets


@st.composite
def convolutions(draw):
    inputs, outputs = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 2), st.integers(0, 2))))
    stride = (1, 1) if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    divisors = [g for g in range(1, inputs + 1) if inputs % g == outputs % g == 0]
    return nn.Conv2d(
        inputs,
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        draw(st.sampled_from(divisors)),
        draw(st.booleans()),
        draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
    )


@given(
    convolutions(),
    st.sampled_from([1, 1.5, 2, 3, 4]),
    st.sampled_from([1, 3, 5, 7]),
    st.sampled_from(["depthwise", "pointwise", 2]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=120, deadline=None)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # the original's own
def test_any_convolution_keeps_shape_dtype_and_layout_or_is_skipped(conv, ratio, d, cheap, last, frozen, calibrated):
    conv.requires_grad_(not frozen)
    if last:
        conv.to(memory_format=torch.channels_last)
    model = nn.Sequential(conv).eval()
    x = torch.randn(3, conv.in_channels, 11, 12).to(conv.weight.dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    policy = Policy((Rule(ratio=ratio, dw_size=d, cheap=cheap),), keep_first=False)
    program = trace(model, x)
    planned = plan(program, policy)
    converted = rewrite(program, planned, fit(program, planned, [x] if calibrated else None).weights)
    expected, actual = model(x), converted(x)
    if planned.skips:
        assert planned.skips[0].reason
        assert torch.equal(expected, actual)
        return
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert actual.isfinite().all()
    ghost = converted.get_submodule("0")
    assert isinstance(ghost, GhostModule)
    several = min(conv.in_channels, ghost.primary_conv.out_channels) > 1
    if several and expected.is_contiguous(memory_format=torch.channels_last):
        assert actual.is_contiguous(memory_format=torch.channels_last)
    assert (ghost.primary_conv.bias is None) == (conv.bias is None)
    assert all(p.requires_grad is not frozen for p in ghost.parameters())
    assert planned.macs_after < planned.macs_before


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_random_graphs_keep_their_shapes(seed):
    model = random_network(seed)
    x = nets.images(3, 9)
    with torch.no_grad():
        for calibration in (None, [x]):
            converted = ghostify(model, 2, cheap=("depthwise", "pointwise")[seed % 2], calibration=calibration)
            assert converted(x).shape == model(x).shape
            assert converted(x).isfinite().all()


def random_network(seed):
    """A random directed graph of convolutions, norms, sums, concatenations and shared modules."""
    generator = torch.Generator().manual_seed(seed)

    def pick(n):
        return int(torch.randint(n, (), generator=generator))

    root, graph = nn.Module(), fx.Graph()
    values = [(graph.placeholder("x"), 3)]
    shared = []
    for i in range(8):
        node, channels = values[-1 - pick(min(3, len(values)))]
        kind = pick(5)
        if kind == 3:
            operands = [v for v in values if v[1] == channels]
            value = (graph.call_function(torch.add, (node, operands[pick(len(operands))][0])), channels)
        elif kind == 4:
            other = values[pick(len(values))]
            value = (graph.call_function(torch.cat, ([node, other[0]], 1)), channels + other[1])
        else:
            outputs = channels if kind == 2 else 2 + pick(9)
            again = [name for name, size in shared if size == channels]
            if kind == 2 and again:
                value = (graph.call_module(again[0], (node,)), channels)
            else:
                setattr(root, f"conv{i}", nn.Conv2d(channels, outputs, 3, padding=1, bias=kind != 1))
                value = (graph.call_module(f"conv{i}", (node,)), outputs)
                if kind == 2:
                    shared.append((f"conv{i}", channels))
            if kind == 1:
                setattr(root, f"norm{i}", nn.BatchNorm2d(outputs))
                value = (graph.call_module(f"norm{i}", (value[0],)), outputs)
                value = (graph.call_function(torch.relu, (value[0],)), outputs)
        values.append(value)
    graph.output(values[-1][0])
    return nets.settle(fx.GraphModule(root, graph), seed)


def test_functional_convolutions_become_modules_and_their_parameters_go():
    model, x = nets.settle(nets.Functional()), nets.images(8)
    converted = ghostify(model, calibration=x)
    assert isinstance(converted.kernel_ghost, GhostModule)
    names = dict(converted.named_parameters())
    assert "kernel" not in names
    assert "offset" not in names
    assert "other" in names
    assert converted(x).shape == model(x).shape


@pytest.mark.parametrize("make", nets.ALL, ids=lambda c: c.__name__)
def test_the_result_runs_at_other_sizes(make):
    model = nets.settle(make())
    converted = ghostify(model, example_inputs=nets.images(2, 12), calibration=nets.images(4, 12))
    other = nets.images(5, 20)
    assert converted(other).shape == model(other).shape


def test_the_result_can_be_traced_again():
    model, x = nets.settle(nets.Residual()), nets.images(4)
    converted = ghostify(model, calibration=x)
    assert torch.equal(fx.symbolic_trace(converted)(x), converted(x))
    twice = ghostify(converted, targets="re:.*primary_conv", cheap="pointwise", calibration=x)
    assert twice(x).shape == model(x).shape


@pytest.mark.parametrize("rule", [Rule(ratio=4), Rule(cheap="pointwise"), Rule(dw_size=5)], ids=str)
def test_weights_of_another_plan_are_refused(rule):
    program = trace(nets.settle(nets.Straight()))
    weights = fit(program, plan(program)).weights
    with pytest.raises(GhostifyError, match=r"weights: those of a\.0 are of another plan"):
        rewrite(program, plan(program, Policy(rule)), weights)


def test_weights_that_are_missing_are_named():
    program = trace(nets.settle(nets.Straight()))
    with pytest.raises(GhostifyError, match=r"weights: have no GhostWeights for a\.0"):
        rewrite(program, plan(program), {})


def test_a_plan_of_another_program_is_refused():
    program, other = (trace(nets.settle(make())) for make in (nets.Straight, nets.Residual))
    for use in (lambda: rewrite(program, plan(other), {}), lambda: fit(program, plan(other))):
        with pytest.raises(GhostifyError, match="plan: is that of another program"):
            use()
