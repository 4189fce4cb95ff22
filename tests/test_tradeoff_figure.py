"""The figure of the README: points of the rows, and a small file."""

import pytest

from benchmarks.experiments import tradeoff_figure
from benchmarks.lib.tables import FIGURES

ROWS = [
    {"how": "original", "score": 93.0},
    {"how": "a", "method": "ghostify, auto and narrow", "score": 92.0, "latency": 0.5},
    {"how": "b", "method": "Tucker", "score": 93.5, "latency": 0.6},
    {"how": "c", "method": "Tucker", "score": 90.0, "latency": None},
    {"how": "d", "method": "Tucker", "score": 90.0, "latency": 2.0},
    {"how": "e", "method": "network decoupling", "score": 90.0, "latency": 0.5},
]


def test_points_are_the_measured_rows_of_the_shown_methods(monkeypatch):
    trainings = {"compare-resnet20": ROWS, "compare-resnet20-2": ROWS[:1]}
    monkeypatch.setattr(tradeoff_figure, "recorded", trainings.get)
    assert list(tradeoff_figure.points("resnet20")) == [
        {"method": "ghostify, auto with pruning", "time": 0.5, "lost": 1.0},
        {"method": "Tucker", "time": 0.6, "lost": tradeoff_figure.LEAST_LOST},
    ]


@pytest.mark.parametrize("network", tradeoff_figure.NETWORKS)
def test_every_network_has_points_of_ghostify_and_of_others(network):
    methods = {point["method"] for point in tradeoff_figure.points(network)}
    assert methods <= set(tradeoff_figure.METHODS)
    assert {method.startswith("ghostify") for method in methods} == {True, False}


def test_the_figure_is_committed_and_small():
    assert 0 < (FIGURES / "tradeoff.png").stat().st_size < 300_000
