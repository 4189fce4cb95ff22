import itertools

import pytest
import torch

from ghostify import trace
from ghostify.budgeting.thinning import thinnings_of
from ghostify.fitting.sensitivity import calibrate
from ghostify.planning.links import links_of
from tests import nets


@pytest.fixture
def thinning():
    program, x = trace(nets.settle(nets.Inverted()), nets.images(1)), nets.images(32)
    (found,) = thinnings_of(program, links_of(program), calibrate(program, x.split(8)), 0)
    return found


def test_fewer_maps_lose_more(thinning):
    lost = [thinning.loss(count) for count in range(4, 49, 4)]
    assert all(b <= 1.05 * a + 1e-6 for a, b in itertools.pairwise(lost))
    assert lost[-1] == pytest.approx(0, abs=1e-6)


def test_maps_are_kept_in_the_originals_order(thinning):
    for count in (1, 7, 24):
        kept = thinning.kept(count)
        assert len(set(kept)) == count
        assert list(kept) == sorted(kept)
    assert set(thinning.kept(7)) < set(thinning.kept(24))


def test_a_link_that_no_image_reaches_is_left_out():
    model = nets.settle(nets.Inverted())
    program, x = trace(model, nets.images(1)), nets.images(8)
    links = list(links_of(program))
    seen = calibrate(program, x)
    assert len(thinnings_of(program, links, seen, 0)) == 1
    assert thinnings_of(program, [], seen, 0) == []


def test_without_sensitivities_the_consumers_outputs_count_alike():
    program, x = trace(nets.settle(nets.Inverted()), nets.images(1)), nets.images(16)
    seen = calibrate(program, x)
    blind = type(seen)(seen.batches, {}, 0.0)
    (found,) = thinnings_of(program, links_of(program), blind, 0)
    assert 0 < found.loss(2) < 1
    assert torch.isfinite(found.importance).all()
