import pytest
import torch

from ghostify import GhostifyError, ghostify, report
from ghostify.reporting.feature_maps import ghost_outputs, layer_outputs, map_errors
from tests import nets


@pytest.mark.parametrize("name", ["a.0", "b.0"])
def test_maps_are_in_the_originals_order(name):
    """Intrinsic maps on the fitted images are nearly the original's, whether or not the next layer is permuted."""
    model, x = nets.settle(nets.Straight(16)), nets.images(32)
    converted = ghostify(model, 2, targets=name, example_inputs=x[:1], calibration=[x])
    layer = next(layer for layer in report(converted).layers if layer.name == name)
    errors = map_errors(ghost_outputs(converted, name, [x], layer.channels), layer_outputs(model, name, [x]))
    assert errors[list(layer.channels[: layer.intrinsic])].median() < 0.2
    assert errors.mean().item() == pytest.approx(layer.fit_error, rel=0.5)


def test_a_layer_that_does_not_run_is_named():
    model = nets.Straight()
    model.spare = torch.nn.Conv2d(3, 3, 1)
    with pytest.raises(GhostifyError, match="spare: does not run"):
        layer_outputs(model, "spare", [nets.images(1)])
