import pytest
import torch

from ghostify import trace
from ghostify.fitting.moments import Moments
from ghostify.fitting.sensitivity import prepare_calibration
from ghostify.search.halves import add_by_halves, conv_error_metric, covariances_of, mean_across_halves, visit_convs
from tests import nets


def halves_of(maps, seed=0):
    halves = [Moments.zero(maps.shape[1], 0) for _ in range(2)]
    for first in range(0, len(maps), 5):
        add_by_halves(halves, maps[first : first + 5], first, len(maps), seed)
    return halves


def test_halves_are_the_images_of_even_and_of_odd_numbers():
    maps = torch.randn(12, 3, 4, 4)
    whole, covariances = covariances_of(halves_of(maps))
    for own, images in zip((whole, *covariances), (maps, maps[::2], maps[1::2]), strict=True):
        torch.testing.assert_close(own, images.transpose(0, 1).flatten(1).double().cov(correction=0))


def test_of_one_image_there_is_only_the_whole():
    whole, covariances = covariances_of(halves_of(torch.randn(1, 3, 4, 4)), free_mean=False)
    assert len(covariances) == 1
    assert torch.equal(covariances[0], whole)


def test_each_half_is_tested_on_the_other():
    assert mean_across_halves([torch.tensor(3.0), torch.tensor(5.0)], lambda a, b: float(a - 2 * b)) == -4
    assert mean_across_halves([torch.tensor(3.0)], lambda a, b: float(a - 2 * b)) == -3


def test_every_convolution_is_visited_once_a_batch():
    program = trace(nets.settle(nets.Residual()), nets.images(1))
    calibration, visited = prepare_calibration(program, nets.images(8).split(4)), []
    visit_convs(program, calibration, lambda first, part, node, *_: visited.append((first, part, node.name)))
    calls = [(c.subgraph_path, call.node) for c in program.convolutions for call in c.calls]
    assert sorted(visited) == sorted((first, *call) for first in (0, 4) for call in calls)


def test_without_a_sensitivity_errors_count_by_the_outputs_whole_variance():
    program = trace(nets.settle(nets.Residual()), nets.images(1))
    calibration = prepare_calibration(program, nets.images(8))
    covariance = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert float((conv_error_metric(calibration, "none", covariance) * covariance).sum()) == pytest.approx(1)
