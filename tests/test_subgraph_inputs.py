import copy

import pytest
import torch
from torch import nn

from ghostify import ghostify, trace
from ghostify.evaluation.metrics import predict, relative_error
from ghostify.fitting.calibration import bind_calibration
from ghostify.fitting.subgraph_inputs import collect_subgraph_inputs
from tests import nets


def test_the_inputs_of_every_call_are_collected_from_both_models():
    program = trace(nets.settle(nets.Wild()), nets.images(1))
    x = nets.images(12)
    converted = copy.deepcopy(program.module)
    batches = bind_calibration(program.module, x.split(6))
    collected = collect_subgraph_inputs(program, converted, "head", batches)
    assert [b.size for b in collected.local_batches] == [6] * 4
    assert [b.first for b in collected.local_batches] == [0, 6, 12, 18]
    assert collected.images == 24
    assert all(torch.equal(b.inputs.values[0], b.converted_inputs.values[0]) for b in collected.local_batches)
    with torch.no_grad():
        converted.backbone.get_submodule("a.0").weight.mul_(1.05)
    changed = collect_subgraph_inputs(program, converted, "head", batches)
    assert not torch.equal(
        changed.local_batches[0].inputs.values[0], changed.local_batches[0].converted_inputs.values[0]
    )


def test_calls_with_a_large_difference_get_the_originals_inputs():
    program = trace(nets.settle(nets.Wild()), nets.images(1))
    converted = copy.deepcopy(program.module)
    nn.init.normal_(converted.backbone.get_submodule("a.0").weight, std=3)
    collected = collect_subgraph_inputs(program, converted, "head", bind_calibration(program.module, nets.images(4)))
    assert all(b.converted_stored is None for b in collected.local_batches)


def test_a_subgraph_that_no_image_reaches_is_fitted_without_images_with_a_warning():
    gate, unreaching = nets.Stubborn.Gate(8).eval(), -torch.ones(8, 8, 6, 6)
    with pytest.warns(UserWarning, match="conv: no calibration image reaches it"):
        converted = ghostify(gate, targets="*", calibration=unreaching)
    free, x = ghostify(gate, targets="*"), torch.rand(2, 8, 6, 6)
    assert torch.equal(converted(x), free(x))
    with pytest.warns(UserWarning, match="no calibration image reaches"):
        ghostify(gate, targets="*", cheap="auto", budget={"macs": 0.7}, example_inputs=x, calibration=unreaching)


def test_a_network_inside_another_module_is_fitted_alike():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x if x.std() >= 0 else -x)

    inner, x = nets.settle(nets.Straight()), nets.images(32, 16)
    alone = ghostify(inner, targets="*", example_inputs=x[:1], calibration=x.split(8))
    inside = ghostify(Around(inner), targets="*", example_inputs=x[:1], calibration=x.split(8))
    torch.testing.assert_close(inside(x), alone(x))


@pytest.mark.parametrize("make", [nets.Wild, nets.Stubborn], ids=lambda c: c.__name__)
@pytest.mark.parametrize("options", [{}, {"cheap": "auto", "budget": {"macs": 0.7}}], ids=["ratio", "budget"])
def test_subgraphs_are_fitted_to_images(make, options):
    model, x = nets.settle(make()), nets.images(64, 16)
    errors = [
        relative_error(
            predict(ghostify(model, targets="*", example_inputs=x[:1], calibration=c, **options), [x]),
            predict(model, [x]),
        )
        for c in (None, x.split(16))
    ]
    assert errors[1] < 0.6 * errors[0]
