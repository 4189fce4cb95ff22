import pytest

from ghostify import Rule, ghostify, report, trace
from ghostify.planning.planner import plan
from ghostify.reporting.outcome import describe_outputs
from ghostify.search.budget import plan_for_budget
from ghostify.search.forecast import with_forecast
from tests import nets


@pytest.mark.parametrize(
    "options", [{"cheap": "depthwise"}, {"cheap": 2}, {"cheap": "auto", "prune": True, "budget": {"macs": 0.6}}]
)
def test_every_calibrated_conversion_reports_its_forecast_and_what_came_of_it(options):
    model, x = nets.settle(nets.Residual(16)), nets.images(48)
    summary = report(ghostify(model, example_inputs=x[:1], calibration=x, **options))
    assert (summary.forecast.images, summary.measured.images) == (24, 6)
    assert summary.measured.error / 2 < summary.forecast.error < 2 * summary.measured.error
    assert (summary.measurements > 0) == ("budget" in options)
    forecast, measured = describe_outputs(summary)
    assert f"output error {summary.forecast.error:.3g}, {summary.forecast.agreement:.0f} % of the answers" in forecast
    assert f"output error {summary.measured.error:.3g}" in measured
    assert ("measured" in forecast) == ("budget" in options)


def test_what_loses_much_warns_before_the_fit():
    model, x = nets.settle(nets.Branches()), nets.images(32)
    program = trace(model, x[:1])
    with pytest.warns(UserWarning, match=r"budget macs 0\.5: expect an output error of .*\d\. With 0\.\d+: an output"):
        plan_for_budget(program, Rule(cheap="auto"), {"macs": 0.5}, x)
    with pytest.warns(UserWarning, match=r"plan: expect an output error of about \d\S*\. Use a smaller ratio"):
        forecast = with_forecast(program, plan(program, Rule(ratio=4, cheap="depthwise")), x).forecast
    assert (forecast.agreement, forecast.images) == (None, 16)
