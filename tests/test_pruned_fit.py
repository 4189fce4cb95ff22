import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ghostify import GhostifyError, Policy, Rule, deploy, fit, ghostify, load, report, rewrite, save, trace
from ghostify.deployment.exporter import export
from ghostify.evaluation.metrics import predict, relative_error
from ghostify.planning.cost import count_macs
from ghostify.planning.planner import GhostRewrite
from ghostify.runtimes.registry import load_runner
from ghostify.search.budget import plan_for_budget
from ghostify.search.costs import COSTS
from ghostify.timing.timer import LatencyTimer
from tests import nets


def planned(share=0.6, squeeze=False, **rule):
    model, x = nets.settle(nets.Inverted(squeeze=squeeze)), nets.images(64)
    program = trace(model, x[:1])
    chosen_plan = plan_for_budget(
        program, Policy((Rule(cheap="auto", prune=True, **rule),)), {"macs": share}, x.split(8)
    )
    assert chosen_plan.pruned
    return model, program, chosen_plan, x


@pytest.mark.parametrize("squeeze", [False, True])
def test_the_fit_reduces_the_error_of_pruning(squeeze):
    model, program, chosen_plan, x = planned(squeeze=squeeze)
    assert len(chosen_plan.pruned) == 3 + 2 * squeeze
    wanted = predict(model, [x])
    unfitted = (
        relative_error(predict(rewrite(program, chosen_plan, {}), [x]), wanted) if not chosen_plan.rewrites else 1.0
    )
    fits = fit(program, chosen_plan, x.split(8))
    fitted = relative_error(predict(rewrite(program, chosen_plan, fits.weights), [x]), wanted)
    assert fitted < 0.5 * unfitted
    for entry in chosen_plan.changes:
        if entry.conv.groups == 1 and not isinstance(entry, GhostRewrite):
            fitted_weights = fits.weights[entry.conv.name]
            assert fitted_weights.fit_error.mean() < 0.2
            assert fitted_weights.holdout_error.shape == fitted_weights.fit_error.shape
            assert fitted_weights.output_error is not None


@pytest.mark.parametrize("squeeze", [False, True])
def test_the_result_saves_loads_deploys_and_trains(tmp_path, squeeze):
    model, x = nets.settle(nets.Inverted(squeeze=squeeze)), nets.images(32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    converted = ghostify(model, prune=True, cheap="auto", budget={"macs": 0.6}, example_inputs=x[:1], calibration=x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again = load(save(converted, tmp_path / "out"))
    assert torch.equal(again(x), converted(x))
    assert report(again) == report(converted)
    torch.testing.assert_close(deploy(converted, x[:1])(x), converted(x), atol=1e-4, rtol=1e-3)
    converted.train()(x).sum().backward()
    assert all(p.grad is not None for p in converted.parameters())


@pytest.mark.parametrize(
    ("make", "cost", "reads_fewer"),
    [
        (nets.Classifier, "params", {"fc2", "fc3"}),
        (nets.DenselyConnected, "macs", {"c", "d"}),
        (nets.Halves, "macs", {"c"}),
    ],
)
def test_linear_layers_and_readers_of_several_groups_are_refitted(make, cost, reads_fewer, tmp_path):
    model, x, test = nets.settle(make()), nets.images(128), nets.images(64, seed=9)
    options = {"prune": True, "cheap": "auto", "budget": {cost: 0.6}, "example_inputs": x[:1]}
    converted = ghostify(model, **options, calibration=x)
    layers = {line.name: line for line in report(converted).layers}
    inputs = {name: line.weight_shape[1] for name, line in layers.items()}
    assert {n for n, line in layers.items() if (line.kept_in_count or inputs[n]) < inputs[n]} >= reads_fewer
    assert {type(converted.get_submodule(n)).__name__ for n in reads_fewer} <= {"Linear", "Conv2d", "GhostModule"}
    assert count_macs(converted, x[:1]) == report(converted).macs_after
    assert COSTS[cost].share_of_model(trace(model, x[:1]), converted, LatencyTimer()) <= 0.6
    assert relative_error(predict(converted, [test]), predict(model, [test])) < 0.2
    again = load(save(converted, tmp_path / "out"))
    assert torch.equal(again(x), converted(x))
    assert report(again) == report(converted)
    torch.testing.assert_close(deploy(converted, x[:1])(x), converted(x), atol=1e-4, rtol=1e-3)
    run = load_runner(export(converted, tmp_path / "exported", format="pt2", example_inputs=x[:1]))
    torch.testing.assert_close(run(test)[0], converted(test), atol=1e-4, rtol=1e-3)


def test_pruned_layers_need_images():
    _, program, chosen_plan, _ = planned()
    with pytest.raises(GhostifyError, match=r"pruning needs calibration images\. Pass calibration"):
        fit(program, chosen_plan)


def test_pruned_layers_cannot_be_reconstructed():
    model, x = nets.settle(nets.Inverted()), nets.images(16)
    options = {"cheap": "auto", "budget": {"macs": 0.6}, "example_inputs": x[:1], "calibration": x}
    with pytest.raises(GhostifyError, match="reconstruct: does not support pruned channels"):
        ghostify(model, prune=True, reconstruct=True, **options)


@pytest.mark.parametrize(
    "between", [lambda: nn.PReLU(16), nn.SiLU, nn.Hardswish, lambda: nn.ZeroPad2d(1), lambda: Slopes(16)]
)
def test_channels_are_pruned_through_modules_with_parameters_per_channel(between):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), between(), nn.Conv2d(16, 8, 3))
    model, x = nets.settle(model), nets.images(32)
    converted = ghostify(model, prune=True, cheap="auto", budget={"macs": 0.5}, example_inputs=x[:1], calibration=x)
    kept = {line.name: line for line in report(converted).layers}["1"].outputs
    assert kept < 16
    assert all(len(p) == kept for name, p in converted.named_parameters() if name.startswith(("2.", "3.")))
    assert relative_error(predict(converted, [x]), predict(model, [x])) < 0.3


class Slopes(nn.Module):
    """PReLU as a function."""

    def __init__(self, channels):
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(channels))

    def forward(self, x):
        return F.prelu(x, self.slopes)
