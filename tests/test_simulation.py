import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ghostify import rewrite, trace
from ghostify.evaluation.output_comparison import OutputSums
from ghostify.fitting.sensitivity import prepare_calibration
from ghostify.modules.layout import GhostLayout, Pointwise
from ghostify.planning.planner import Skip, build_plan
from ghostify.pruning.pruning_groups import PruningGroup, find_pruning_groups
from ghostify.pruning.slicing import PrunedConvWeights
from ghostify.search.model_changes import ConvChange, change_of_group, change_of_plan
from ghostify.search.simulation import Simulator
from tests import nets


def simulator_of(model, x):
    program = trace(nets.settle(model), x[:1])
    return Simulator(program, prepare_calibration(program, x.split(8)), 0)


class Pair(nn.Module):
    """A convolution whose maps a 1 x 1 convolution without a bias reads, through a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nets.conv_norm(3, 12)
        self.second = nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(F.relu(self.second(self.first(x))).mean((2, 3)))


def test_a_simulated_pruned_group_equals_the_network_with_absorbed_filters():
    model, x = Pair(), nets.images(24)
    simulator = simulator_of(model, x)
    program = simulator.program
    group = next(g for g in find_pruning_groups(program) if isinstance(g, PruningGroup))
    kept = (0, 3, 4, 8, 11)
    plan = build_plan(program, [Skip(c, "") for c in program.convolutions], {group: kept})
    assert [c.name for c in change_of_plan(plan, {})] == [c.name for c in change_of_group(program, group, kept)]
    (forecast,) = simulator.compare([change_of_group(program, group, kept)])

    with torch.no_grad():
        first, second = model.first, model.second
        rows = first(x[::2]).permute(0, 2, 3, 1).reshape(-1, 12).double()
        of_kept = torch.cat((rows[:, kept], torch.ones(len(rows), 1)), 1)
        predictors = torch.linalg.lstsq(of_kept, rows).solution
        filters = second[0].weight[:, :, 0, 0].double()
        absorbed = filters @ predictors.T
        weights = {
            "first.0": PrunedConvWeights(first[0].weight[list(kept)], None, None, torch.zeros(5)),
            "second.0": PrunedConvWeights(
                absorbed[:, :5, None, None].float(), None, absorbed[:, 5].float(), torch.zeros(6)
            ),
        }
        pruned, sums = rewrite(program, plan, weights), OutputSums()
        sums.add([pruned(x[1::2])], [program.module(x[1::2])], simulator.scale.deviations, 12)
    expected = sums.comparison()
    assert forecast.images == expected.images == 12
    assert forecast.agreement == expected.agreement
    assert forecast.error == pytest.approx(expected.error, rel=1e-2)


@pytest.mark.parametrize("make", nets.ALL, ids=lambda c: c.__name__)
def test_the_nodes_from_the_first_change_on_give_what_whole_forwards_give(make, monkeypatch):
    simulator = simulator_of(make(), nets.images(16))
    convs = [c for c in simulator.program.convolutions if c.unsupported_reason is None and c.groups == 1]
    singles = [(ConvChange(c.name, layout=GhostLayout(c.outputs, 2, Pointwise())),) for c in convs]
    pruned = [(ConvChange(c.name, kept_in=(0, 2)),) for c in convs]
    models = [*singles, *pruned, tuple(change for (change,) in singles), ()]
    results = simulator.compare(models)
    monkeypatch.setattr(Simulator, "_is_one_graph", False)
    whole = simulator.compare(models)
    assert [r.error for r in results] == pytest.approx([r.error for r in whole], rel=1e-4, abs=1e-9)
    assert results[-1].error == 0
    assert all(r.error > 0 for r in results[:-1])


def test_outputs_that_do_not_correspond_are_not_compared():
    sums = OutputSums()
    sums.add([torch.ones(4, 2)], [torch.ones(4, 3)], [torch.ones(())], 4)
    sums.add([torch.ones(4, 3)], [torch.ones(4, 3)], [torch.ones(())], 4)
    assert sums.comparison() is None
    assert OutputSums().comparison() is None
