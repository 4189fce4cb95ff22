import pytest
import torch
from torch import nn

from ghostify import trace
from ghostify.fitting.calibration import bind_calibration
from ghostify.fitting.chosen_images import choose_images, even_images, holdout_images, odd_images
from ghostify.fitting.output_errors import compare_outputs
from ghostify.fitting.sensitivity import prepare_calibration
from tests import nets


class Numbered(nn.Module):
    """The first value of each image, from a forward without a graph."""

    def forward(self, x):
        return x[:, 0, 0, 0] if x.sum() > -1 else x


@pytest.mark.parametrize("splits", [True, False])
def test_every_second_image_is_chosen_from_batches_of_any_size(splits):
    module = trace(nn.Identity()).module if splits else Numbered()
    x = torch.arange(21.0)[:, None, None, None].expand(-1, 1, 2, 2)
    batches = bind_calibration(module, [x[:5], x[5:6], x[6:]])
    for choice, expected in ((even_images(21, 100), range(0, 21, 2)), (odd_images(21, 100), range(1, 21, 2))):
        chosen = list(choose_images(batches, choice))
        numbers = [
            images.of((images.inputs.values if splits else images.inputs.args)[0])[:, 0, 0, 0] for images in chosen
        ]
        assert torch.cat(numbers).tolist() == list(expected)
        assert [int(n[0]) for n in numbers] == [images.first for images in chosen]
        assert [len(n) for n in numbers] == [images.size for images in chosen]


def test_few_of_many_images_are_spread_evenly():
    numbers = torch.arange(1000)
    assert numbers[odd_images(1000, 50)(numbers)].tolist() == list(range(1, 1000, 20))
    assert not odd_images(1, 50)(torch.zeros(1)).any()
    assert not holdout_images(1)(torch.zeros(1)).any()


def test_outputs_are_compared_on_the_holdout():
    """Adding the same to all outputs keeps the answers; the error is its square relative to the deviations."""
    x = nets.images(24)
    program = trace(nets.settle(nets.Straight()))
    original = program.module
    shifted = trace(nets.settle(nets.Straight())).module
    shifted.load_state_dict(original.state_dict())
    with torch.no_grad():
        shifted.get_submodule("fc").bias += 0.5
    calibration = prepare_calibration(program, x.split(7))
    assert compare_outputs(original, original, calibration).error == 0
    comparison = compare_outputs(original, shifted, calibration)
    (deviation,) = calibration.output_scale.deviations
    assert comparison.error == pytest.approx(float((0.5 / deviation.expand(5)).square().sum()), rel=1e-3)
    assert (comparison.agreement, comparison.images) == (100, 3)
