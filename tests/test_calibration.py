import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ghostify import GhostifyError, trace
from ghostify.fitting.calibration import HOLDOUT_RUNS, MAX_BATCH_VALUES, bind_calibration, holdout_mask, split
from ghostify.graph.inputs import PlaceholderValues
from tests import nets


def module():
    return trace(nets.Straight().eval()).module


def test_images_are_numbered_over_batches_and_large_batches_are_split():
    images = MAX_BATCH_VALUES // (3 * 64 * 64)
    batches = bind_calibration(module(), [torch.zeros(5, 3, 64, 64), torch.zeros(images + 2, 3, 64, 64)])
    assert [(b.number, b.first, b.size) for b in batches.local_batches] == [
        (0, 0, 5),
        (1, 5, images),
        (1, images + 5, 2),
    ]
    assert batches.images == images + 7


def test_a_list_is_not_copied_and_batches_of_an_iterator_are_stored():
    x = nets.images(4)
    assert bind_calibration(module(), [x]).local_batches[0].stored.values[0].data_ptr() == x.data_ptr()
    streamed = bind_calibration(module(), (x * k for k in range(3)))
    assert torch.equal(streamed.local_batches[2].inputs.values[0], 2 * x)


def test_bound_batches_are_returned_unchanged():
    batches = bind_calibration(module(), nets.images(4))
    assert bind_calibration(module(), batches) is batches


def test_inputs_with_different_numbers_of_images_are_not_split():
    inputs = PlaceholderValues((torch.zeros(6, 3), torch.zeros(2, 2)))
    assert split(inputs, 2) == [inputs]
    assert [p.values[0].shape[0] for p in split(PlaceholderValues((torch.zeros(5, 3), 7)), 2)] == [2, 2, 1]


def test_labels_are_dropped():
    assert len(bind_calibration(module(), [(nets.images(4), torch.zeros(4))]).local_batches[0].inputs.values) == 1


@pytest.mark.parametrize("batch", [torch.tensor(1.0), torch.zeros(0, 3, 8, 8), torch.zeros(2, 3, 0, 8)])
def test_batches_without_images_are_an_error(batch):
    with pytest.raises(GhostifyError, match="calibration batch 0: has no images"):
        bind_calibration(module(), [batch])


class Flattening(nn.Module):
    """A network whose `view` needs contiguous maps."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).view(x.shape[0], -1)


def test_images_are_channels_last_where_the_model_supports_it():
    x = nets.images(4)
    assert (
        bind_calibration(module(), [x])
        .local_batches[0]
        .inputs.values[0]
        .is_contiguous(memory_format=torch.channels_last)
    )
    assert bind_calibration(trace(Flattening().eval()).module, [x]).local_batches[0].inputs.values[0].is_contiguous()


@given(st.integers(1, 3000))
def test_the_holdout_is_an_eighth_of_the_images_in_few_runs(images):
    mask = holdout_mask(torch.arange(images), images)
    runs = int(mask.diff(prepend=torch.zeros(1, dtype=torch.bool)).sum() + 1) // 2
    assert runs <= 2 * HOLDOUT_RUNS
    assert mask.sum() == (images > 1 if images < 16 else pytest.approx(images / 8, rel=0.5))
