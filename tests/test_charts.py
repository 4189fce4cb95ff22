import pytest

from ghostify import Policy, Rule, frontier, ghostify, report, trace
from ghostify.reporting.charts import COLOURS, error_chart, frontier_chart, layers_chart
from ghostify.reporting.outcome import outcome_of
from tests import nets


def values(spec):
    own = spec.get("data", {}).get("values", [])
    return own + [row for layer in spec.get("layer", []) for row in values(layer)]


@pytest.fixture(scope="module")
def made():
    x = nets.images(16)
    return ghostify(nets.settle(nets.Straight()), 2, example_inputs=x[:1], calibration=x.split(8))


def test_every_convolution_has_its_bar(made):
    found = report(made)
    spec = layers_chart(found)
    rows = {row["layer"]: row for row in values(spec)}
    assert list(rows) == [line.name for line in found.layers]
    assert all(rows[x.name]["before"] == x.macs_before and rows[x.name]["after"] == x.macs_after for x in found.layers)
    assert {row["what"] for row in rows.values()} <= set(COLOURS)
    assert rows["stem.0"]["what"] == outcome_of(found.layers[0]) == "skipped"


def test_costs_add_up(made):
    assert sum(row["share"] for row in values(error_chart(report(made)))) == pytest.approx(1)


def test_the_frontier_shows_drops_where_they_were_measured():
    x = nets.images(8)
    program = trace(nets.settle(nets.Straight()), x[:1])
    curve = [p.to_dict() for p in frontier(program, Policy((Rule(cheap="auto"),)), points=3)]
    plain = frontier_chart(curve, 0.5)
    assert [row["value"] for row in values(plain) if "value" in row] == [p["error"] for p in curve]
    judged = frontier_chart([{**p, "drop": 1.5} for p in curve], None)
    assert {row["value"] for row in values(judged)} == {1.5}
