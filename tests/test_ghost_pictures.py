import pytest
import torch
from torch.nn import functional as F

from ghostify import GhostifyError, ghostify, report
from ghostify.modules.ghost import GhostModule
from ghostify.reporting.ghost_pictures import cheap_kernels, is_picturable, picture_ghosts
from tests import nets


@pytest.mark.parametrize("cheap", ["depthwise", "pointwise", 4])
def test_cheap_kernels_compute_the_ghosts(cheap):
    converted = ghostify(nets.settle(nets.Straight(12)), 2.5, cheap=cheap)
    ghost = next(m for m in converted.modules() if isinstance(m, GhostModule))
    kernels = cheap_kernels(ghost)
    intrinsic = torch.randn(2, ghost.primary_conv.out_channels, 7, 7)
    expected = ghost.cheap_operation(intrinsic)
    bias = torch.cat([conv.bias for conv in ghost.cheap_convs]) if ghost.cheap_convs[0].bias is not None else None
    computed = F.conv2d(intrinsic, kernels, bias, padding=kernels.shape[-1] // 2)
    torch.testing.assert_close(computed, expected, atol=1e-5, rtol=1e-4)


def test_ghosts_are_pictured_from_the_best_to_the_worst():
    model, x = nets.settle(nets.Straight(16)), nets.images(16)
    converted = ghostify(model, 2, example_inputs=x[:1], calibration=x.split(8))
    layer = next(layer for layer in report(converted).layers if layer.name == "b.0")
    pictures = picture_ghosts(converted, model, layer, x.split(8), count=4)
    assert len(pictures.ghosts) == 4
    assert len(pictures.errors) == len(layer.channels) - layer.intrinsic
    errors = [ghost.error for ghost in pictures.ghosts]
    assert errors == sorted(errors)
    assert [errors[0], errors[-1]] == [min(pictures.errors), max(pictures.errors)]
    for ghost in pictures.ghosts:
        assert ghost.channel in layer.channels[layer.intrinsic :]
        assert ghost.source in layer.channels[: layer.intrinsic]
        images = (ghost.intrinsic, ghost.ghost, ghost.original, ghost.kernel)
        assert all(image.startswith("data:image/png") for image in images)


def test_a_layer_without_ghosts_cannot_be_pictured():
    model, x = nets.settle(nets.Straight()), nets.images(4)
    converted = ghostify(model, 2, example_inputs=x[:1])
    first = report(converted).layers[0]
    assert not is_picturable(converted, model, first)
    with pytest.raises(GhostifyError, match=r"stem\.0: is not a ghost module"):
        picture_ghosts(converted, model, first, [x])
