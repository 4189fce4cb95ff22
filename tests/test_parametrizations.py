import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ghostify import deploy, ghostify, load, report, save
from ghostify.graph.parametrizations import fix_computed_weights, has_computed_weights
from tests import nets

NORMS = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "former spectral_norm": nn.utils.spectral_norm,
    "former weight_norm": nn.utils.weight_norm,
}


def normed(norm, *paths):
    model = nets.settle(nets.Straight())
    for path in paths:
        norm(model.get_submodule(path))
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_parts_with_computed_weights_are_saved_and_deployed_as_the_weights_of_evaluation(norm, tmp_path):
    model, x = normed(norm, "stem.0", "fc"), nets.images(2)
    made = ghostify(model, example_inputs=x)
    save(made.train(), tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.training
    assert type(loaded.stem.get_submodule("0")) is nn.Conv2d
    assert loaded.fc.weight.requires_grad
    torch.testing.assert_close(loaded.eval()(x), made.eval()(x))
    assert report(loaded) == report(made)
    torch.testing.assert_close(deploy(made, x)(x), made(x), rtol=1e-4, atol=1e-4)
    made.train()(x).sum().backward()


def test_other_copies_keep_their_parametrizations():
    model = normed(parametrizations.weight_norm, "a.0")
    kept, fixed, x = copy.deepcopy(model), copy.deepcopy(model), nets.images(2)
    fix_computed_weights(fixed)
    assert type(fixed.a.get_submodule("0")) is nn.Conv2d
    assert torch.equal(kept(x), model(x))
    torch.testing.assert_close(fixed(x), model(x))


def test_a_computed_buffer_becomes_a_buffer():
    class Doubled(nn.Module):
        def forward(self, tensor):
            return 2 * tensor

    module = nn.Module()
    module.register_buffer("scale", torch.ones(2))
    nn.utils.parametrize.register_parametrization(module, "scale", Doubled())
    fix_computed_weights(module)
    assert dict(module.named_buffers())["scale"].tolist() == [2, 2]


def test_computed_weights_are_found():
    assert has_computed_weights(normed(parametrizations.weight_norm, "a.0"))
    assert not has_computed_weights(nets.Straight())
