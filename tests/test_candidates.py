import pytest

from ghostify.search.candidates import Candidate, lower_hull


def candidate(cost, loss):
    return Candidate(None, (float(cost),), loss)


def test_only_candidates_on_the_lower_hull_of_loss_and_cost_stay():
    dense, good, mixed, cheap = candidate(10, 0), candidate(6, 0.1), candidate(4, 0.9), candidate(2, 1.0)
    assert lower_hull([dense, good, mixed, cheap]) == [dense, good, cheap]


@pytest.mark.parametrize("losses", [(0, 0.1, 0.3, 0.7), (0, 1, 3, 9)])
def test_candidates_whose_losses_rise_faster_and_faster_all_stay(losses):
    candidates = [candidate(10 - 2 * k, loss) for k, loss in enumerate(losses)]
    assert lower_hull(candidates) == candidates


def test_the_unchanged_layer_stays_whatever_the_others_cost():
    dense, cheaper, free = candidate(10, 0), candidate(8, 0), candidate(6, 0)
    assert lower_hull([dense, cheaper, free])[0] is dense
