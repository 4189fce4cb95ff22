import pytest
import torch
from torch import nn

from ghostify import GhostifyError, ghostify
from ghostify.evaluation.comparison import compare_models
from ghostify.evaluation.metrics import predict, relative_error
from tests import nets


def test_comparison_on_labelled_images():
    model, x = nets.settle(nets.Straight()), nets.images(16)
    converted, labels = ghostify(model, 2), predict(model, [x]).argmax(1)
    comparison = compare_models(converted, model, x.split(8), labels)
    outputs, expected = predict(converted, [x]), predict(model, [x])
    assert comparison.images == 16
    assert comparison.original_top1 == pytest.approx(100)
    assert (
        comparison.top1
        == comparison.agreement
        == pytest.approx(100 * (outputs.argmax(1) == expected.argmax(1)).float().mean().item())
    )
    assert comparison.error == pytest.approx(relative_error(outputs, expected))


def test_values_are_none_without_labels_or_original():
    x = nets.images(4)
    alone = compare_models(nets.settle(nets.Straight()), None, [x], None)
    assert (alone.top1, alone.original_top1, alone.agreement, alone.error) == (None, None, None, None)
    maps = nn.Conv2d(3, 4, 3)
    assert compare_models(maps, maps, [x], torch.zeros(4)) == compare_models(maps, maps, [x], None)
    assert compare_models(maps, maps, [x], None).agreement is None


def test_several_outputs_are_refused():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(GhostifyError, match="Two: its output is not one tensor"):
        compare_models(Two(), None, [nets.images(1)], None)
