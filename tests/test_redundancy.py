import json

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ghostify import GhostifyError, trace
from ghostify.reporting.redundancy import pairs_of, study_layer, table, write_pictures
from tests import nets


@pytest.mark.parametrize("d", [1, 3, 5])
def test_pairs_are_those_of_a_least_squares_solver(d):
    maps = torch.randn(3, 4, 7, 6)
    maps[:, 3] = 2 * F.conv2d(maps[:, :1], torch.randn(1, 1, 3, 3), padding=1)[:, 0] + 1
    found = pairs_of(maps, d)
    for i in range(4):
        for j in range(4):
            if i == j:
                assert found.squared[i, j] == float("inf")
                continue
            rows = F.unfold(maps[:, i : i + 1], d, padding=d // 2).transpose(1, 2).reshape(-1, d * d).double()
            given, wanted = torch.cat((rows, torch.ones(len(rows), 1)), 1), maps[:, j].reshape(-1, 1).double()
            left = given @ torch.linalg.lstsq(given, wanted).solution - wanted
            assert found.squared[i, j].item() == pytest.approx(left.square().mean().item(), rel=1e-3, abs=1e-4)
            share = left.square().mean() / wanted.var(correction=0)
            assert found.relative[i, j].item() == pytest.approx(share.item(), rel=1e-3, abs=1e-4)
    if d > 1:
        assert found.best(2)[0] == (0, 3)
    assert len({k for pair in found.best(9) for k in pair}) == 4


def test_a_study_of_a_layer(tmp_path):
    model, x = nets.settle(nets.Straight(16)), nets.images(8)
    found = study_layer(trace(model, x[:1]), "b.0", x.split(4))
    with torch.no_grad():
        torch.testing.assert_close(found.maps, model.b[0](model.a(model.stem(x)))[0])
    assert len(found.intrinsic) == 16
    ghosts = [k for k in range(32) if k not in found.intrinsic]
    assert found.errors[list(found.intrinsic)].max() < found.errors[ghosts].max()
    facts = json.loads(json.dumps(found.to_dict()))
    assert 0 < facts["ghosts relative, median"] <= 1.05
    errors = [facts["best relative, median"][str(d)] for d in (1, 3, 5, 7)]
    assert errors == sorted(errors, reverse=True)
    assert table(found).row_count == 5
    for file in write_pictures(found, tmp_path):
        with Image.open(file) as image:
            assert image.size[0] > 300


@pytest.mark.parametrize("layer", ["a.0", "b.0"])
def test_ghosts_stand_beside_their_own_originals(layer):
    """Whether or not the order of channels is taken up by the layer behind."""
    model, x = nets.settle(nets.Straight(16)), nets.images(8)
    found = study_layer(trace(model, x[:1]), layer, x.split(4))
    assert found.errors.median() < 1
    assert found.errors[list(found.intrinsic)].median() < 0.2


def test_layers_that_cannot_be_studied():
    model, x = nets.settle(nets.Straight()), nets.images(2)
    program = trace(model, x)
    with pytest.raises(GhostifyError, match="nothing: is no convolution of the model: it has "):
        study_layer(program, "nothing", [x])
    with pytest.raises(GhostifyError, match="a study needs images"):
        study_layer(program, "a.0", [])
    depthwise = trace(nn.Sequential(nn.Conv2d(3, 3, 3, groups=3)), x)
    with pytest.raises(GhostifyError, match="0: depthwise"):
        study_layer(depthwise, "0", [x])
