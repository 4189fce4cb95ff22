from dataclasses import replace

import pytest

from ghostify import ghostify, report
from ghostify.reporting.analysis import layer_costs, skipped_by_reason, suggestions
from tests import nets


def found(**wish):
    x = nets.images(16)
    return report(ghostify(nets.settle(nets.Straight()), 2, example_inputs=x[:1], **wish))


def test_every_layer_is_left_alone_for_one_reason_or_costs_something():
    made = found(ignore="a.0", calibration=nets.images(16).split(8))
    left = {name: group.reason for group in skipped_by_reason(made) for name in group.names}
    assert left == {line.name: line.skip_reason for line in made.layers if line.skip_reason}
    shares = [c.error_share for c in layer_costs(made)]
    assert {c.line.name for c in layer_costs(made)} | set(left) == {line.name for line in made.layers}
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    assert sum(c.saved_share for c in layer_costs(made)) == pytest.approx(1)
    whole = sum(group.share for group in skipped_by_reason(made))
    assert whole == pytest.approx(sum(x.macs_before for x in made.layers if x.skip_reason) / made.macs_before)


def test_what_the_outputs_do_not_feel_costs_nothing():
    made = found(calibration=nets.images(16).split(8))
    lines = tuple(replace(x, output_error=None, holdout_error=9.0) if x.name == "a.0" else x for x in made.layers)
    assert layer_costs(replace(made, layers=lines))[-1].line.name == "a.0"
    assert layer_costs(replace(made, layers=lines))[-1].error_share == 0


def test_without_images_images_are_advised():
    said = [one.option for one in suggestions(found())]
    assert "--calibration DIR" in said
    assert "--calibration DIR" not in [one.option for one in suggestions(found(calibration=nets.images(16).split(8)))]


def test_a_layer_that_costs_more_than_it_saves_is_better_left():
    made = found(calibration=nets.images(16).split(8))
    lines = [
        replace(x, output_error=10.0 if x.name == "a.0" else 0.1, macs_after=x.macs_before - 1) for x in made.layers
    ]
    lines = [replace(x, macs_after=0) if x.name == "b.0" else x for x in lines]
    said = [one.option for one in suggestions(replace(made, layers=tuple(lines)))]
    assert "--ignore a.0" in said
    assert "--ignore b.0" not in said


def test_slower_layers_are_named():
    said = suggestions(found(), {"a.0": (1.0, 1.2), "b.0": (1.0, 1.0)})
    slower = next(one for one in said if "slower" in one.text)
    assert "a.0" in slower.text
    assert "b.0" not in slower.text
