import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ghostify import GhostifyError, deploy, ghostify, load, report, save
from tests import nets


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.same = nets.conv_norm(3, 8), nn.Conv2d(8, 8, 3, padding="same", bias=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x, *, scale):
        y = F.hardswish(self.same(F.relu(self.stem(x), inplace=True)), inplace=True)
        y = F.max_pool2d(y, 2) + F.avg_pool2d(y, 2)
        pooled = F.adaptive_avg_pool2d(torch.cat((y, y), 1), 1).flatten(1)
        return {"logits": self.head(F.dropout(pooled, 0.5, self.training)) * scale, "maps": [y]}


def exported(model, x, **kwargs):
    return torch.export.export(model, (x,), kwargs).module()


def test_an_exported_program_is_converted_and_saved(tmp_path):
    x, scale = nets.images(2), torch.ones(1) * 2
    model = nets.settle(Mixed())
    program = exported(model, x, scale=scale)
    example = {"x": x, "scale": scale}
    same = ghostify(program, 1, example_inputs=example)
    for output, expected in zip(same(**example).values(), model(**example).values(), strict=True):
        torch.testing.assert_close(output, expected)
    converted = ghostify(program, example_inputs=example)
    assert [(layer.name, layer.skip_reason) for layer in report(converted).layers] == [
        ("stem.0.weight", "first convolution (keep_first)"),
        ("same.weight", None),
    ]
    save(converted, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")(**example)["logits"], converted(**example)["logits"])


def test_an_exported_program_has_an_inference_form():
    x = nets.images(2)
    program = exported(nets.settle(nets.Straight()), x)
    torch.testing.assert_close(deploy(program, x)(x), program(x), rtol=1e-4, atol=1e-4)


def test_an_exported_program_within_a_model_is_converted():
    x = nets.images(2)
    model = nn.Sequential(exported(nets.settle(nets.Straight()), x), nn.ReLU())
    assert torch.equal(ghostify(model, 1)(x), model(x))
    assert report(ghostify(model)).rewritten == report(ghostify(nets.settle(nets.Straight()))).rewritten


def test_an_exported_program_in_training_mode_is_refused():
    program = exported(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nets.images(2))
    with pytest.raises(GhostifyError, match=r"is in training mode\. Call \.eval\(\)"):
        ghostify(program)
