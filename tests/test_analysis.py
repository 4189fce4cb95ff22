from dataclasses import replace

import pytest

from ghostify import ghostify, report
from ghostify.reporting.analysis import layer_costs, skipped_by_reason, suggestions
from tests import nets


def converted_report(**options):
    x = nets.images(16)
    return report(ghostify(nets.settle(nets.Straight()), 2, example_inputs=x[:1], **options))


def fitted_report(**options):
    return converted_report(calibration=nets.images(16).split(8), **options)


def options_of(summary, latencies=None):
    return [suggestion.option for suggestion in suggestions(summary, latencies)]


def test_every_layer_is_skipped_for_a_reason_or_has_a_cost():
    summary = fitted_report(ignore="a.0")
    reasons = {name: group.reason for group in skipped_by_reason(summary) for name in group.names}
    assert reasons == {layer.name: layer.skip_reason for layer in summary.layers if layer.skip_reason}
    costs = layer_costs(summary)
    assert {cost.layer.name for cost in costs} | set(reasons) == {layer.name for layer in summary.layers}
    shares = [cost.error_share for cost in costs]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    assert sum(cost.saved_share for cost in costs) == pytest.approx(1)
    skipped_share = sum(group.share for group in skipped_by_reason(summary))
    skipped_macs = sum(layer.macs_before for layer in summary.layers if layer.skip_reason)
    assert skipped_share == pytest.approx(skipped_macs / summary.macs_before)


def test_a_layer_without_output_error_has_no_share():
    summary = fitted_report()
    layers = tuple(replace(x, output_error=None, holdout_error=9.0) if x.name == "a.0" else x for x in summary.layers)
    last = layer_costs(replace(summary, layers=layers))[-1]
    assert last.layer.name == "a.0"
    assert last.error_share == 0


def test_images_are_suggested_where_there_were_none():
    assert "--calibration DIR" in options_of(converted_report())
    assert "--calibration DIR" not in options_of(fitted_report())


def test_a_layer_with_more_error_than_saving_is_suggested_to_be_skipped():
    summary = fitted_report()
    layers = [
        replace(x, output_error=10.0 if x.name == "a.0" else 0.1, macs_after=x.macs_before - 1) for x in summary.layers
    ]
    layers = [replace(x, macs_after=0) if x.name == "b.0" else x for x in layers]
    options = options_of(replace(summary, layers=tuple(layers)))
    assert "--ignore a.0" in options
    assert "--ignore b.0" not in options


def test_slower_layers_are_named():
    latencies = {"a.0": (1.0, 1.2), "b.0": (1.0, 1.0)}
    slower = next(s for s in suggestions(converted_report(), latencies) if "slower" in s.text)
    assert "a.0" in slower.text
    assert "b.0" not in slower.text


def test_depthwise_ghosts_that_need_a_gather_are_named():
    summary = fitted_report(cheap="depthwise")
    reordered = [layer.name for layer in summary.layers if layer.reorders_output]
    assert reordered == ["b.0"]
    gathers = next(s for s in suggestions(summary) if s.option == "--cheap pointwise")
    assert "b.0" in gathers.text
    assert "a.0" not in gathers.text
    assert "--cheap pointwise" not in options_of(fitted_report(cheap="pointwise"))
