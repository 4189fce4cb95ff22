import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ghostify.errors import GhostifyError
from ghostify.fitting import lstsq
from ghostify.fitting.data_free import white_input_statistics
from ghostify.modules.layout import Depthwise, GhostLayout, Grouped, Pointwise, intrinsic_count
from ghostify.search.layer_statistics import LayerStatistics
from ghostify.search.loss_estimator import LossEstimator, truncation_losses


def test_few_images_are_not_taken_to_be_simple():
    """Directions found on a handful of rows leave more of the others than of themselves."""
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).double()
    halves = tuple(h.T @ h / len(h) for h in rows.split(6))
    eye = torch.eye(8, dtype=torch.float64)
    crossed = truncation_losses(LayerStatistics(halves, None, eye))
    own = [truncation_losses(LayerStatistics((h,), None, eye)) for h in halves]
    torch.testing.assert_close(own[0], torch.cat((torch.zeros(1), torch.linalg.eigvalsh(halves[0]).cumsum(0))))
    assert (crossed[1:-1] > (own[0] + own[1])[1:-1] / 2).all()
    assert crossed[-1] == pytest.approx(float((own[0] + own[1])[-1] / 2))


@given(st.integers(2, 12), st.sampled_from([1.25, 1.5, 2, 3, 4]), st.integers(0, 99))
def test_a_depthwise_layout_loses_no_less_than_hoped(n, ratio, seed):
    """So that what is beaten at the hoped loss need not be solved."""

    class Maps:
        def pair_errors(self, weights):
            return torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * weights

    m = intrinsic_count(n, ratio)
    assume(m < n)
    losses = LossEstimator(
        LayerStatistics((torch.eye(n, dtype=torch.float64),), Maps(), torch.eye(n, dtype=torch.float64)), 3
    )
    layout = GhostLayout(n, m, Depthwise(3))
    assert losses.lower_bound(layout) <= losses.of(layout) + 1e-12


def smooth_filters(seed, outputs):
    """Filters whose outputs vary slowly from pixel to pixel, so that neighbours tell much of each other."""
    blur = torch.tensor([[1, 0.6, 0.2], [0.6, 1, 0.6], [0.2, 0.6, 1]])
    return torch.randn(outputs, 6, 3, 3, generator=torch.Generator().manual_seed(seed)) @ blur


def predicted_and_fitted(filters, layout):
    """What planning expects a layout to lose under white inputs, and what the fit to the same moments loses."""
    d = layout.kernel_size
    one, pairs = white_input_statistics(filters, 1), white_input_statistics(filters, d, map_by_map=True)
    weights = 1 / one.var / len(filters)
    losses = LossEstimator(LayerStatistics((one.gram[0, :, 0],), pairs, torch.diag(weights)), d)
    stats = white_input_statistics(filters, d)
    solution = lstsq.solve_ghosts(stats, layout, torch.diag(weights))
    return losses, float((weights * stats.squared_errors(solution)).sum())


@given(st.sampled_from([(16, 8, 4), (16, 8, 2), (24, 12, 4), (18, 12, 4)]), st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_grouped_ghosts_of_3_x_3_pixels_lose_no_more_than_predicted_and_not_what_low_rank_does(size, seed):
    outputs, intrinsic, width = size
    layout = GhostLayout(outputs, intrinsic, Grouped(width, 3))
    losses, fitted = predicted_and_fitted(smooth_filters(seed, outputs), layout)
    low_rank = losses.of(GhostLayout(outputs, intrinsic, Pointwise()))
    assert low_rank < 0.97 * fitted
    assert fitted <= losses.of(layout) <= 1.6 * fitted
    assert losses.lower_bound(layout) <= losses.of(layout)


@pytest.mark.parametrize("form", [Grouped(4, 1), Grouped(2, 1), Pointwise()])
def test_ghosts_of_one_pixel_lose_what_is_predicted(form):
    losses, fitted = predicted_and_fitted(smooth_filters(0, 16), GhostLayout(16, 8, form))
    assert losses.of(GhostLayout(16, 8, form)) == pytest.approx(fitted, rel=1e-3)


def test_all_intrinsic_maps_through_3_x_3_pixels_are_not_taken_for_one_pixel():
    layout = GhostLayout(16, 8, Grouped(8, 3))
    losses, fitted = predicted_and_fitted(smooth_filters(0, 16), layout)
    assert fitted < 0.9 * losses.of(layout)
    assert losses.of(layout) == pytest.approx(losses.of(GhostLayout(16, 8, Pointwise())))


def test_one_intrinsic_map_through_one_pixel_is_low_rank():
    losses, _ = predicted_and_fitted(smooth_filters(0, 8), GhostLayout(8, 4, Depthwise(3)))
    assert losses.of(GhostLayout(8, 1, Depthwise(1))) == pytest.approx(float(losses._truncation_losses[7]))


@pytest.mark.parametrize("form", [Depthwise(5), Depthwise(1), Grouped(2, 5)])
def test_the_loss_of_kernels_that_were_not_looked_at_is_refused(form):
    losses, _ = predicted_and_fitted(smooth_filters(0, 8), GhostLayout(8, 4, Depthwise(3)))
    with pytest.raises(GhostifyError, match=f"kernel size {form.kernel_size}: no pair statistics"):
        losses.of(GhostLayout(8, 4, form))
