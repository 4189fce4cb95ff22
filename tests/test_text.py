import torch

from ghostify.text import format_shape


def test_shapes_are_sizes_with_a_cross_between():
    assert format_shape(torch.zeros(3, 8, 8).shape) == "3x8x8"
    assert format_shape(("N", 3)) == "Nx3"
