import pytest
import torch
from torch import nn

import ghostify.fitting.row_sample as module
from ghostify import Policy, Rule, ghostify, report
from ghostify.evaluation.metrics import predict, relative_error
from ghostify.fitting.linear_solvers import solve_ridge
from ghostify.fitting.moments import Moments
from ghostify.fitting.row_sample import Rows, SplitRows, refit_on_rows, sampled_rows_for
from tests import nets


def rows_and_moments(count=50, features=7, targets=3):
    generator = torch.Generator().manual_seed(0)
    u, y = (torch.randn(count, size, generator=generator) + 1 for size in (features, targets))
    moments = Moments.zero(features, targets)
    moments.add(u, y)
    return Rows(u, y), moments, torch.randn(features, targets, generator=generator).double()


@pytest.mark.parametrize("free_mean", [False, True])
def test_rows_answer_as_their_moments_do(free_mean):
    rows, moments, filters = rows_and_moments()
    every, close = torch.arange(3), {"rtol": 1e-5, "atol": 1e-5}
    for actual, expected in zip(
        (rows.mean_u, rows.mean_y, rows.mean_square_y, rows.count, rows.covariance_of(filters, free_mean=free_mean)),
        (
            moments.mean_u,
            moments.mean_y,
            moments.mean_square_y,
            moments.count,
            moments.covariance_of(filters, free_mean=free_mean),
        ),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, **close)
    for actual, expected in zip(
        (rows.errors_of(filters, every, free_mean=free_mean), rows.target_variances(free_mean=free_mean)),
        (moments.errors_of(filters, every, free_mean=free_mean), moments.target_variances(free_mean=free_mean)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, **close)
    torch.testing.assert_close(
        rows.projected(filters.T).centred()[0], moments.projected(filters.T).centred()[0], **close
    )


@pytest.mark.parametrize("free_mean", [False, True])
@pytest.mark.parametrize("count", [4, 50])
def test_the_dual_ridge_is_the_ridge(count, free_mean):
    rows, moments, prior = rows_and_moments(count)
    split = SplitRows(7, 3)
    split.add(rows.u, rows.y, torch.zeros(count, dtype=torch.bool))
    uu, uy, _ = moments.centred() if free_mean else moments.raw()
    for ridge in (1e-3, 0.1, 1.0):
        filters = refit_on_rows(split, prior, torch.ones(3), (ridge,), ridge, free_mean=free_mean)
        torch.testing.assert_close(filters, solve_ridge(uu, uy, prior, ridge), rtol=1e-3, atol=1e-3)


def test_the_ridge_is_chosen_on_the_holdout():
    """Where the holdout follows the prior, the largest ridge is best; where it follows the fit, the smallest."""
    generator = torch.Generator().manual_seed(0)
    u, prior, other = (torch.randn(*shape, generator=generator) for shape in ((80, 6), (6, 2), (6, 2)))
    for true, ridge in ((prior, 100.0), (other, 1e-4)):
        split, is_holdout = SplitRows(6, 2), torch.arange(80) >= 40
        y = torch.where(is_holdout[:, None], u @ true, u @ other)
        split.add(u, y, is_holdout)
        alone = SplitRows(6, 2)
        alone.add(u[:40], y[:40], is_holdout[:40])
        weights, ridges = torch.ones(2), (1e-4, 100.0)
        chosen = refit_on_rows(split, prior.double(), weights, ridges, 1.0, free_mean=False)
        expected = refit_on_rows(alone, prior.double(), weights, (), ridge, free_mean=False)
        torch.testing.assert_close(chosen, prior.double() if ridge > 1 else expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"cheap": "pointwise"}, {"cheap": 2}, {"activated": True}], ids=["dw", "pw", "grouped", "activated"]
)
@pytest.mark.parametrize("make", [nets.Residual, nets.Shared, nets.Stubborn])
def test_a_fit_to_rows_is_nearly_as_good_as_one_to_moments(monkeypatch, make, options):
    model, x = nets.settle(make()), nets.images(32)
    options |= {"example_inputs": x[:1], "calibration": x}
    by_moments = ghostify(model, **options)
    monkeypatch.setattr(module, "MAX_MOMENT_FEATURES", 7)
    monkeypatch.setattr(module, "MAX_SAMPLED_ROWS", 400)
    by_rows = ghostify(model, **options)
    expected, test = predict(model, [nets.images(seed=9)]), [nets.images(seed=9)]
    errors = [relative_error(predict(m, test), expected) for m in (by_rows, by_moments)]
    assert errors[0] < 2 * errors[1] + 0.01
    names = [layer.name for layer in report(by_rows).layers if layer.skip_reason is None]
    subjects, others = ([note.partition(":")[0] for note in report(m).notes] for m in (by_rows, by_moments))
    assert [subject for subject in subjects if subject != "mean error of the layers"] == names
    assert not set(others) & set(names)


def test_pruned_layers_are_fitted_to_rows(monkeypatch):
    model, x = nets.settle(nets.Inverted(16)), nets.images(32)
    options = {"cheap": "auto", "prune": True, "budget": {"macs": 0.6}, "example_inputs": x[:1], "calibration": x}
    by_moments = ghostify(model, **options)
    monkeypatch.setattr(module, "MAX_MOMENT_FEATURES", 7)
    monkeypatch.setattr(module, "MAX_SAMPLED_ROWS", 400)
    by_rows = ghostify(model, **options)
    expected = predict(model, [x])
    errors = [relative_error(predict(m, [x]), expected) for m in (by_rows, by_moments)]
    assert errors[0] < 1.5 * errors[1] + 0.01


def test_rows_take_bounded_memory():
    for features in (12_289, 18_432, 65_536, 10**6, 10**9):
        rows = sampled_rows_for(features)
        assert 1 <= rows <= module.MAX_SAMPLED_ROWS
        assert rows == 1 or 4 * rows * features <= module.MAX_SAMPLE_BYTES


def test_few_positions_of_many_values_are_fitted():
    """1,024 values a filter, at 3 positions of each image."""
    model, x = (
        nn.Sequential(nn.Conv2d(1, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, (64, 1))).eval(),
        torch.randn(4, 1, 66, 1),
    )
    policy = Policy((Rule("2", cheap="pointwise"),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_MOMENT_FEATURES", 1024)
        converted = ghostify(model, policy=policy, example_inputs=x, calibration=[x])
        assert not any(note.startswith("2:") for note in report(converted).notes)
        patch.setattr(module, "MAX_MOMENT_FEATURES", 1023)
        converted = ghostify(model, policy=policy, example_inputs=x, calibration=[x])
    assert any(n.startswith("2: fitted to about 2048 positions, since") for n in report(converted).notes)
    assert converted(x).isfinite().all()
