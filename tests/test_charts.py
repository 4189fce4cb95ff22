import pytest

from ghostify import Policy, Rule, frontier, ghostify, report, trace
from ghostify.reporting.charts import COLOURS, error_chart, frontier_chart, layers_chart
from ghostify.reporting.outcome import outcome_of
from tests import nets


def values(spec):
    rows = spec.get("data", {}).get("values", [])
    return rows + [row for layer in spec.get("layer", []) for row in values(layer)]


@pytest.fixture(scope="module")
def summary():
    x = nets.images(16)
    return report(ghostify(nets.settle(nets.Straight()), 2, example_inputs=x[:1], calibration=x.split(8)))


def test_every_convolution_has_its_bar(summary):
    rows = {row["layer"]: row for row in values(layers_chart(summary))}
    assert list(rows) == [layer.name for layer in summary.layers]
    for layer in summary.layers:
        assert rows[layer.name]["before"] == layer.macs_before
        assert rows[layer.name]["after"] == layer.macs_after
    assert {row["outcome"] for row in rows.values()} <= set(COLOURS)
    assert rows["stem.0"]["outcome"] == outcome_of(summary.layers[0]) == "skipped"


def test_error_shares_add_up(summary):
    assert sum(row["error share"] for row in values(error_chart(summary))) == pytest.approx(1)


def test_the_frontier_shows_drops_where_they_were_measured():
    x = nets.images(8)
    program = trace(nets.settle(nets.Straight()), x[:1])
    curve = [p.to_dict() for p in frontier(program, Policy((Rule(cheap="auto"),)), points=3)]
    predicted = frontier_chart(curve, 0.5)
    assert [row["error"] for row in values(predicted) if "error" in row] == [p["error"] for p in curve]
    assert [row["share"] for row in values(predicted) if "error" not in row] == [0.5]
    evaluated = frontier_chart([{**p, "drop": 1.5} for p in curve], None)
    assert {row["drop"] for row in values(evaluated)} == {1.5}
