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


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3).long(), "labels: are 3 for 4 images"),
        (torch.zeros(4, 5).long(), "labels: are 4x5 for 4 images"),
        (torch.tensor(0), "labels: are a scalar for 4 images"),
        (torch.zeros(4), "labels: have type torch.float32"),
        (torch.zeros(4).bool(), "labels: have type torch.bool"),
        (torch.tensor([0, 5, 1, 2]), r"labels: class 5 is not one of the model's 5 classes \(0 to 4\)"),
        (torch.tensor([0, 4, -1, 2]), "labels: class -1 is not one"),
    ],
)
def test_labels_that_are_not_one_class_for_each_image_are_refused(labels, message):
    model = nets.settle(nets.Straight())
    with pytest.raises(GhostifyError, match=message):
        compare_models(model, None, [nets.images(4)], labels)


def test_an_original_with_other_outputs_is_refused():
    model, other = nets.settle(nets.Straight()), nets.settle(nets.Branches())
    with pytest.raises(GhostifyError, match="original: its outputs are 4x10x12x12, those of the model 4x5"):
        compare_models(model, other, [nets.images(4)], None)


@pytest.mark.parametrize(
    "batches", [[nets.images(2), nets.images(2)[:, :1]], [torch.zeros(2)], [torch.zeros(2).long()]]
)
def test_images_that_the_model_does_not_run_on_are_refused(batches):
    with pytest.raises(GhostifyError, match=r"images: Straight does not run on batch \d \(RuntimeError: ") as caught:
        compare_models(nets.settle(nets.Straight()), None, batches, None)
    assert str(caught.value).isprintable()


def test_maps_of_different_sizes_are_refused():
    with pytest.raises(GhostifyError, match="images: the outputs of their batches differ in shape"):
        compare_models(nn.Conv2d(3, 4, 3), None, [nets.images(2), nets.images(2, 8)], None)
