import pytest
import torch
from torch import nn

from ghostify import GhostifyError, ghostify
from ghostify.evaluation.comparison import compare_models
from ghostify.evaluation.metrics import predict, relative_error
from tests import nets


def test_a_verdict_on_labelled_images():
    model, x = nets.settle(nets.Straight()), nets.images(16)
    made, labels = ghostify(model, 2), predict(model, [x]).argmax(1)
    found = compare_models(made, model, x.split(8), labels)
    answers, wanted = predict(made, [x]), predict(model, [x])
    assert found.images == 16
    assert found.original_top1 == pytest.approx(100)
    assert (
        found.top1
        == found.agreement
        == pytest.approx(100 * (answers.argmax(1) == wanted.argmax(1)).float().mean().item())
    )
    assert found.error == pytest.approx(relative_error(answers, wanted))


def test_what_is_not_there_is_not_judged():
    x = nets.images(4)
    alone = compare_models(nets.settle(nets.Straight()), None, [x], None)
    assert (alone.top1, alone.original_top1, alone.agreement, alone.error) == (None, None, None, None)
    maps = nn.Conv2d(3, 4, 3)
    assert compare_models(maps, maps, [x], torch.zeros(4)) == compare_models(maps, maps, [x], None)
    assert compare_models(maps, maps, [x], None).agreement is None


def test_several_outputs_cannot_be_judged():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(GhostifyError, match="Two: its output is not one tensor"):
        compare_models(Two(), None, [nets.images(1)], None)
