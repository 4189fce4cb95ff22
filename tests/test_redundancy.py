import json

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ghostify import GhostifyError, trace
from ghostify.reporting.redundancy import pair_errors, study_layer, study_table, write_pictures
from tests import nets


@pytest.mark.parametrize("d", [1, 3, 5])
def test_pair_errors_equal_those_of_a_least_squares_solver(d):
    maps = torch.randn(3, 4, 7, 6)
    maps[:, 3] = 2 * F.conv2d(maps[:, :1], torch.randn(1, 1, 3, 3), padding=1)[:, 0] + 1
    pairs = pair_errors(maps, d)
    for i in range(4):
        for j in range(4):
            if i == j:
                assert pairs.squared[i, j] == float("inf")
                continue
            patches = F.unfold(maps[:, i : i + 1], d, padding=d // 2).transpose(1, 2).reshape(-1, d * d).double()
            rows, values = torch.cat((patches, torch.ones(len(patches), 1)), 1), maps[:, j].reshape(-1, 1).double()
            residuals = rows @ torch.linalg.lstsq(rows, values).solution - values
            assert pairs.squared[i, j].item() == pytest.approx(residuals.square().mean().item(), rel=1e-3, abs=1e-4)
            relative = residuals.square().mean() / values.var(correction=0)
            assert pairs.relative[i, j].item() == pytest.approx(relative.item(), rel=1e-3, abs=1e-4)
    if d > 1:
        assert pairs.best(2)[0] == (0, 3)
    assert len({k for pair in pairs.best(9) for k in pair}) == 4


def test_a_study_of_a_layer(tmp_path):
    model, x = nets.settle(nets.Straight(16)), nets.images(8)
    study = study_layer(trace(model, x[:1]), "b.0", x.split(4))
    with torch.no_grad():
        torch.testing.assert_close(study.maps, model.b[0](model.a(model.stem(x)))[0])
    assert len(study.intrinsic) == 16
    ghosts = [k for k in range(32) if k not in study.intrinsic]
    assert study.errors[list(study.intrinsic)].max() < study.errors[ghosts].max()
    facts = json.loads(json.dumps(study.to_dict()))
    assert facts["ghosts"] == ghosts
    assert 0 < facts["ghost_error_median"] <= 1.05
    errors = [facts["best_error_median"][str(d)] for d in (1, 3, 5, 7)]
    assert errors == sorted(errors, reverse=True)
    counts = [facts["maps_with_small_error"][str(d)] for d in (1, 3, 5, 7)]
    assert counts == sorted(counts)
    for pair in facts["pairs"]:
        assert pair["relative_error"]["3"] == study.pairs[1].relative[pair["source"], pair["target"]]
    assert study_table(study).row_count == 5
    for file in write_pictures(study, tmp_path):
        with Image.open(file) as image:
            assert image.size[0] > 300


@pytest.mark.parametrize("layer", ["a.0", "b.0"])
def test_ghosts_are_compared_with_the_maps_they_replace(layer):
    """Whether or not the following layer takes the new channel order."""
    model, x = nets.settle(nets.Straight(16)), nets.images(8)
    study = study_layer(trace(model, x[:1]), layer, x.split(4))
    assert study.errors.median() < 1
    assert study.errors[list(study.intrinsic)].median() < 0.2


def test_layers_that_cannot_be_studied():
    model, x = nets.settle(nets.Straight()), nets.images(2)
    program = trace(model, x)
    with pytest.raises(GhostifyError, match=r"nothing: is not a convolution of the model. Choose from stem\.0"):
        study_layer(program, "nothing", [x])
    with pytest.raises(GhostifyError, match="images: are empty"):
        study_layer(program, "a.0", [])
    depthwise = trace(nn.Sequential(nn.Conv2d(3, 3, 3, groups=3)), x)
    with pytest.raises(GhostifyError, match=r"0: cannot be studied \(depthwise"):
        study_layer(depthwise, "0", [x])
