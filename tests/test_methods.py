import copy

import pytest
import torch
from torch import nn

from ghostify import GhostifyError, ghostify, load, save
from tests import nets


def converted(ratio=2, **options):
    model = nets.settle(nets.Methods())
    return model, ghostify(model, ratio, example_inputs=nets.images(2), **options)


def test_methods_of_an_empty_plan_are_the_originals():
    (model, same), x = converted(1), nets.images(3)
    features = model.forward_features(x)
    assert torch.equal(same.forward_features(x), features)
    assert torch.equal(same.forward_head(features), model(x))
    assert torch.equal(same.forward_head(features, pre_logits=True), model.forward_head(features, pre_logits=True))


def test_methods_go_through_the_ghosts_in_copies_and_after_saving_too(tmp_path):
    (_, made), x = converted(targets="*"), nets.images(3)
    save(made, tmp_path / "out")
    for again in (made, copy.deepcopy(made), load(tmp_path / "out")):
        assert torch.equal(again.forward_head(again.forward_features(x)), made(x))


def test_order_is_not_taken_up_beyond_the_end_of_a_method():
    class Late(nets.Methods):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(16, 5, 1)

        def forward_head(self, x):
            return self.fc(x).mean((2, 3))

    model, x = nets.settle(Late()), nets.images(64)
    made = ghostify(model, cheap="pointwise", calibration=[x])
    wanted = model.forward_features(x)
    assert (made.forward_features(x) - wanted).square().sum() < 0.2 * wanted.var() * wanted.numel()
    assert torch.equal(made.forward_head(made.forward_features(x)), made(x))


def test_the_classifier_can_be_read_and_reset():
    (_, made), x = converted(), nets.images(2)
    assert made.get_classifier() is made.fc
    made.reset_classifier(7)
    assert made(x).shape == (2, 7)
    assert copy.deepcopy(made).num_classes == 7
    assert made.get_classifier().weight.requires_grad
    made.reset_classifier(0)
    assert made(x).shape == (2, 16)
    with pytest.raises(GhostifyError, match="class Identity cannot be recreated"):
        made.reset_classifier(7)
    with pytest.raises(GhostifyError, match="pooling is fixed"):
        made.reset_classifier(7, "max")


@pytest.mark.parametrize("why", ["twice", "more inputs", "other arguments", "a list"])
def test_methods_that_are_no_stretch_of_the_graph_are_left_out(why):
    class Other(nets.Methods):
        def forward_features(self, x, times=1):
            return super().forward_features(x * times)

        def both(self, x):
            return [x, self.shift]

        def inner(self, y):
            return y + self.shift

        def forward(self, x):
            if why == "other arguments":
                return self.forward_head(self.forward_features(x, times=2))
            if why == "twice":
                return self.forward_head(self.forward_features(x) + self.forward_features(x))
            if why == "a list":
                return self.forward_head(self.forward_features(self.both(x)[0]))
            self.shift = x.mean()
            return self.forward_head(self.inner(self.forward_features(x)))

    model = nets.settle(Other())
    model.shift = 0
    made, x = ghostify(model, 1), nets.images(2)
    assert torch.equal(made(x), model(x))
    lost = {
        "twice": "forward_features",
        "more inputs": "inner",
        "other arguments": "forward_features",
        "a list": "both",
    }
    assert not hasattr(made, lost[why])
    assert hasattr(made, "forward_head")


def test_a_model_without_methods_has_none():
    made = ghostify(nets.settle(nets.Straight()))
    assert not hasattr(made, "forward_features")
    assert not hasattr(made, "get_classifier")
    assert all("forward_features" not in vars(cls) for cls in type(made).__mro__)
