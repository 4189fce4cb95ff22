import copy

import timm
import torch
from torch import nn

from ghostify import ghostify, load, report, save
from tests import nets


class Named(nets.Straight):
    def __init__(self):
        super().__init__()
        self.num_classes, self.default_cfg = 5, {"input_size": (3, 12, 12), "mean": [0.5]}
        self.cache, self.sensor = torch.ones(2), object()

    def forward_features(self, x):
        return self.b(self.a(self.stem(x)))


def test_serializable_attributes_survive_copies_and_saving(tmp_path):
    converted = ghostify(nets.settle(Named()))
    save(converted, tmp_path / "out")
    for module in (converted, copy.deepcopy(converted), load(tmp_path / "out")):
        assert module.num_classes == 5
        assert module.default_cfg == {"input_size": (3, 12, 12), "mean": [0.5]}


def test_missing_attributes_are_listed_by_name():
    assert report(ghostify(nets.settle(Named()))).missing_attributes == ("cache", "forward_features", "sensor")
    assert report(ghostify(nets.settle(nets.Wild()), targets="*")).missing_attributes == ()


def test_timm_models_keep_their_configuration():
    model = timm.create_model("resnet10t", num_classes=7).eval()
    converted = ghostify(model, cheap="pointwise")
    assert converted.num_classes == 7
    assert converted.pretrained_cfg == model.pretrained_cfg
    missing = set(report(converted).missing_attributes)
    assert not {"forward_features", "forward_head", "get_classifier", "reset_classifier"} & missing
    assert "forward_intermediates" in missing
    assert isinstance(converted, nn.Module)
