import pytest
import torch

from ghostify import GhostifyError, ghostify, report
from ghostify.reporting.feature_maps import errors_of, ghost_outputs, layer_outputs
from tests import nets


@pytest.mark.parametrize("name", ["a.0", "b.0"])
def test_maps_stand_in_the_originals_order(name):
    """Fitted on the very images, intrinsic maps are nearly the original's, whoever takes up their order."""
    model, x = nets.settle(nets.Straight(16)), nets.images(32)
    made = ghostify(model, 2, targets=name, example_inputs=x[:1], calibration=[x])
    line = next(line for line in report(made).layers if line.name == name)
    errors = errors_of(ghost_outputs(made, name, [x], line.channels), layer_outputs(model, name, [x]))
    assert errors[list(line.channels[: line.intrinsic])].median() < 0.2
    assert errors.mean().item() == pytest.approx(line.fit_error, rel=0.5)


def test_a_layer_that_does_not_run_is_named():
    model = nets.Straight()
    model.spare = torch.nn.Conv2d(3, 3, 1)
    with pytest.raises(GhostifyError, match="spare: does not run"):
        layer_outputs(model, "spare", [nets.images(1)])
