import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ghostify import GhostifyError, Policy, Rule, deploy, fit, ghostify, load, report, rewrite, save, trace
from ghostify.evaluation.metrics import predict, relative_error
from ghostify.planning.planner import GhostRewrite
from ghostify.search.budget import plan_for_budget
from tests import nets


def planned(share=0.6, squeeze=False, **rule):
    model, x = nets.settle(nets.Inverted(squeeze=squeeze)), nets.images(64)
    program = trace(model, x[:1])
    decided = plan_for_budget(program, Policy((Rule(cheap="auto", prune=True, **rule),)), {"macs": share}, x.split(8))
    assert decided.pruned
    return model, program, decided, x


@pytest.mark.parametrize("squeeze", [False, True])
def test_the_fit_makes_good_what_leaving_out_costs(squeeze):
    model, program, decided, x = planned(squeeze=squeeze)
    assert len(decided.pruned) == 3 + 2 * squeeze
    wanted = predict(model, [x])
    cut = relative_error(predict(rewrite(program, decided, {}), [x]), wanted) if not decided.rewrites else 1.0
    fits = fit(program, decided, x.split(8))
    fitted = relative_error(predict(rewrite(program, decided, fits.weights), [x]), wanted)
    assert fitted < 0.5 * cut
    for entry in decided.changes:
        if entry.conv.groups == 1 and not isinstance(entry, GhostRewrite):
            own = fits.weights[entry.conv.name]
            assert own.fit_error.mean() < 0.2
            assert own.holdout_error.shape == own.fit_error.shape
            assert own.output_error is not None


@pytest.mark.parametrize("squeeze", [False, True])
def test_the_result_saves_loads_deploys_and_trains(tmp_path, squeeze):
    model, x = nets.settle(nets.Inverted(squeeze=squeeze)), nets.images(32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = ghostify(model, prune=True, cheap="auto", budget={"macs": 0.6}, example_inputs=x[:1], calibration=x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again = load(save(made, tmp_path / "out"))
    assert torch.equal(again(x), made(x))
    assert report(again) == report(made)
    torch.testing.assert_close(deploy(made, x[:1])(x), made(x), atol=1e-4, rtol=1e-3)
    made.train()(x).sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_narrow_layers_take_images():
    _, program, decided, _ = planned()
    with pytest.raises(GhostifyError, match="is to be narrow, which takes images"):
        fit(program, decided)


def test_blocks_are_not_compared_where_maps_are_missing():
    model, x = nets.settle(nets.Inverted()), nets.images(16)
    wish = {"cheap": "auto", "budget": {"macs": 0.6}, "example_inputs": x[:1], "calibration": x}
    with pytest.raises(GhostifyError, match="reconstruct: does not support pruned channels"):
        ghostify(model, prune=True, reconstruct=True, **wish)


@pytest.mark.parametrize(
    "between", [lambda: nn.PReLU(16), nn.SiLU, nn.Hardswish, lambda: nn.ZeroPad2d(1), lambda: Slopes(16)]
)
def test_channels_are_pruned_through_what_has_parameters_for_them(between):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), between(), nn.Conv2d(16, 8, 3))
    model, x = nets.settle(model), nets.images(32)
    made = ghostify(model, prune=True, cheap="auto", budget={"macs": 0.5}, example_inputs=x[:1], calibration=x)
    kept = {line.name: line for line in report(made).lines}["1"].outputs
    assert kept < 16
    assert all(len(p) == kept for name, p in made.named_parameters() if name.startswith(("2.", "3.")))
    assert relative_error(predict(made, [x]), predict(model, [x])) < 0.3


class Slopes(nn.Module):
    """PReLU as a function."""

    def __init__(self, channels):
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(channels))

    def forward(self, x):
        return F.prelu(x, self.slopes)
