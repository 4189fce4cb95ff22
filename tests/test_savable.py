import torch

from ghostify import ghostify, load, save
from ghostify.graph.savable import SELF_INSTALLED, savable
from tests import nets


def hooked_by(library, model):
    """The model as a library leaves it that hooks a part when the model first runs."""

    def hook(*_):
        return None

    hook.__module__ = library
    model.a.register_forward_hook(hook)
    model._hooks_installed = True
    return model


def test_hooks_that_a_library_installs_again_are_not_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(SELF_INSTALLED, "some.library", "_hooks_installed")
    x = nets.images(2)
    made = hooked_by("some.library", ghostify(nets.settle(nets.Straight())))
    save(made, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")(x), made(x))
    assert len(made.a._forward_hooks) == 1
    assert not hasattr(savable(made), "_hooks_installed")


def test_other_hooks_and_plain_weights_stay_as_they_are():
    model = hooked_by("mine", nets.Straight())
    assert savable(model) is model
