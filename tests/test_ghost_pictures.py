import pytest
import torch
from torch.nn import functional as F

from ghostify import GhostifyError, ghostify, report
from ghostify.modules.ghost import GhostModule
from ghostify.reporting.ghost_pictures import is_picturable, kernels_of, picture_ghosts
from tests import nets


@pytest.mark.parametrize("cheap", ["depthwise", "pointwise", 4])
def test_kernels_make_the_ghosts(cheap):
    made = ghostify(nets.settle(nets.Straight(12)), 2.5, cheap=cheap)
    ghost = next(m for m in made.modules() if isinstance(m, GhostModule))
    kernels = kernels_of(ghost)
    intrinsic = torch.randn(2, ghost.primary_conv.out_channels, 7, 7)
    wanted = ghost.cheap_operation(intrinsic)
    bias = torch.cat([conv.bias for conv in ghost.cheap_convs]) if ghost.cheap_convs[0].bias is not None else None
    found = F.conv2d(intrinsic, kernels, bias, padding=kernels.shape[-1] // 2)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_ghosts_from_the_best_to_the_worst():
    model, x = nets.settle(nets.Straight(16)), nets.images(16)
    made = ghostify(model, 2, example_inputs=x[:1], calibration=x.split(8))
    line = next(line for line in report(made).layers if line.name == "b.0")
    shown = picture_ghosts(made, model, line, x.split(8), count=4)
    assert len(shown.ghosts) == 4
    assert len(shown.errors) == len(line.channels) - line.intrinsic
    errors = [g.error for g in shown.ghosts]
    assert errors == sorted(errors)
    assert [errors[0], errors[-1]] == [min(shown.errors), max(shown.errors)]
    for ghost in shown.ghosts:
        assert ghost.channel in line.channels[line.intrinsic :]
        assert ghost.source in line.channels[: line.intrinsic]
        assert all(p.startswith("data:image/png") for p in (ghost.intrinsic, ghost.ghost, ghost.original, ghost.kernel))


def test_what_is_no_ghost_module_cannot_be_shown():
    model, x = nets.settle(nets.Straight()), nets.images(4)
    made = ghostify(model, 2, example_inputs=x[:1])
    first = report(made).layers[0]
    assert not is_picturable(made, model, first)
    with pytest.raises(GhostifyError, match=r"stem\.0: is no ghost module"):
        picture_ghosts(made, model, first, [x])
