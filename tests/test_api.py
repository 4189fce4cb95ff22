"""The promises of the design, each by name."""

import copy

import pytest
import timm
import torch
from torch import fx, nn

from ghostify import GhostifyError, GhostModule, Policy, Rule, ghostify, report
from tests import nets

EVERY = pytest.mark.parametrize("make", [*nets.ALL, nets.Wild], ids=lambda c: c.__name__)


@EVERY
def test_promise_1_the_callers_model_is_untouched(make):
    model, x = nets.settle(make()), nets.images()
    next(model.children()).train()
    model.register_forward_hook(lambda *_: None)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    children, state = [id(m) for m in model.modules()], torch.get_rng_state()
    ghostify(model, example_inputs=x, calibration=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [id(m) for m in model.modules()] == children
    assert [m.training for m in model.modules()] == modes
    assert len(model._forward_hooks) == 1
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@EVERY
def test_promise_1_an_empty_plan_is_bit_equal(make):
    model, x = nets.settle(make()), nets.images()
    same = ghostify(model, 1, example_inputs=x)
    assert isinstance(same, fx.GraphModule) == (make is not nets.Wild)
    assert report(same).rewritten == 0
    assert torch.equal(same(x), model(x))
    assert set(same.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_promise_2_dtype_and_memory_format_carry_over(dtype):
    model = nets.settle(nets.Straight()).to(dtype).to(memory_format=torch.channels_last)
    x = nets.images().to(dtype).to(memory_format=torch.channels_last)
    converted = ghostify(model, calibration=x)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert converted(x).dtype == dtype
    primary = converted.get_submodule("a.0").primary_conv
    assert primary.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"targets": "nothing.*"}, "targets 'nothing.*': matches no convolution"),
        ({"ratio": 0.9}, "ratio 0.9: is not a number of at least 1"),
        ({"policy": Policy(), "targets": "a.0"}, "Pass either, not both"),
    ],
)
def test_promise_3_errors_say_what_and_what_to_do(wish, message):
    with pytest.raises(GhostifyError, match=message):
        ghostify(nets.settle(nets.Straight()), **wish)


@pytest.mark.parametrize("policy", [{"rule": []}, {}, "p.toml", Policy, [Rule()]], ids=str)
def test_promise_3_only_a_policy_is_a_policy(policy):
    with pytest.raises(GhostifyError, match=r"^policy: is .* Pass a Policy"):
        ghostify(nets.settle(nets.Straight()), policy=policy)


def test_promise_3_a_rule_beside_a_policy_is_refused():
    for beside in ({"ratio": 3}, {"dw_size": 5}, {"ignore": "a.0"}, {"activated": True}):
        with pytest.raises(GhostifyError, match=r"^targets, ignore, ratio, .* Pass either, not both"):
            ghostify(nets.settle(nets.Straight()), policy=Policy(), **beside)


def test_a_single_rule_is_a_policy():
    model, x = nets.settle(nets.Straight()), nets.images()
    assert torch.equal(ghostify(model, policy=Rule(ratio=3))(x), ghostify(model, 3)(x))


def test_promise_3_a_model_without_a_report_says_so():
    with pytest.raises(GhostifyError, match="has no report"):
        report(fx.symbolic_trace(nets.settle(nets.Straight())))


@pytest.mark.parametrize("make", [nets.Residual, nets.Branches])
def test_promise_4_train_and_eval_follow_the_original(make):
    model, x = nets.settle(make()), nets.images()
    converted = ghostify(model, calibration=x)
    still = converted(x)
    converted.train()
    assert not torch.equal(converted(x), converted(x))
    converted.eval()
    assert not torch.equal(converted(x), still)  # BatchNorm took up statistics
    assert torch.equal(converted(x), converted(x))
    assert not ghostify(model).training
    assert ghostify(model.train()).training


@EVERY
def test_promise_4_every_parameter_gets_a_gradient(make):
    converted = ghostify(nets.settle(make()), 3, calibration=nets.images()).train()
    converted(nets.images()).square().sum().backward()
    gradients = {n: p.grad for n, p in converted.named_parameters()}
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients.values())


def test_promise_5_a_shared_convolution_is_one_module():
    converted = ghostify(nets.settle(nets.Shared()), calibration=nets.images())
    ghosts = [m for m in converted.modules() if isinstance(m, GhostModule)]
    calls = [n for n in converted.graph.nodes if n.op == "call_module" and n.target == "again"]
    assert (len(ghosts), len(calls)) == (1, 2)


@EVERY
def test_promise_7_same_inputs_and_seed_same_result(make):
    model, x = nets.settle(make()), nets.images()
    torch.manual_seed(1)
    first = ghostify(model, calibration=x)
    torch.manual_seed(2)
    again = ghostify(model, calibration=x)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("ratio", [1.5, 2, 3, 4])
@pytest.mark.parametrize("dw_size", [1, 3, 5, 7])
def test_ratios_and_kernel_sizes_with_odd_channel_counts(ratio, dw_size):
    model = nets.settle(
        nn.Sequential(nn.Conv2d(3, 7, 3), nn.Conv2d(7, 13, 3), nn.BatchNorm2d(13), nn.Conv2d(13, 11, 3))
    )
    converted = ghostify(model, ratio, dw_size=dw_size, calibration=nets.images())
    assert converted(nets.images()).shape == model(nets.images()).shape
    expected = {n: -(-c // ratio) for n, c in (("1", 13), ("3", 11))}
    for line in report(converted).layers:
        if line.skip_reason is None:
            assert line.intrinsic == expected[line.name]


def test_shorthand_and_policy_agree():
    model, x = nets.settle(nets.Straight()), nets.images()
    short = ghostify(model, 3, dw_size=5, targets=["a.*", "b.*"], ignore=("b.0",), calibration=x)
    policy = Policy((Rule(("a.*", "b.*"), "b.0", 3, 5),), keep_first=False)
    assert torch.equal(short(x), ghostify(model, policy=policy, calibration=x)(x))


def test_targets_reach_the_first_convolution():
    converted = ghostify(nets.settle(nets.Straight()), targets="stem.0")
    assert isinstance(converted.get_submodule("stem.0"), GhostModule)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto"])
def test_models_that_people_use(name):
    """`test_zoo.py` has one of each family."""
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64)
    converted = ghostify(model, 2, example_inputs=x)
    summary = report(converted)
    assert summary.rewritten > 5
    assert summary.macs_after < 0.75 * summary.macs_before
    assert converted(x).shape == model(x).shape
