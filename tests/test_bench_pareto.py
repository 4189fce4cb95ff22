"""The comparison's figures: points of the rows, and an SVG with a mark for every method."""

import pytest

from benchmarks.experiments import compare, pareto
from benchmarks.lib.cells import label
from benchmarks.lib.figures import family, shape


def rows(methods, *, distilled):
    yield {"how": "original", "score": 90.0, "macs": 1.0, "latency": 1.0}
    for method in methods:
        for seed, score in enumerate((89.0, 88.0)):
            limit = {"limit": ["macs", 0.5], "seed": seed, "macs": 0.5, "latency": 0.6 + seed / 10}
            yield {"how": f"{method}, seed {seed}", "method": method, "score": score, "taught": distilled, **limit}


def test_a_point_is_the_mean_of_the_seeds_with_their_range():
    shown = list(pareto.points(list(rows(["low rank"], distilled=90.5))))
    untrained, by_time, distilled, _ = shown
    assert (untrained["lost"], untrained["minimum"], untrained["maximum"]) == (1.5, 1.0, 2.0)
    assert by_time["share"] == pytest.approx(0.65)
    assert distilled["lost"] == 0  # better than the original: clipped


def test_results_without_training_have_no_points_after_training():
    assert {p["stage"] for p in pareto.points(list(rows(["Tucker"], distilled=None)))} == {"not trained"}


def test_the_picture_names_every_method():
    svg = pareto.picture(list(rows(compare.METHODS, distilled=89.5)))
    assert svg.startswith("<svg")
    assert all(label(method) in svg for method in compare.METHODS)


def test_every_method_has_its_own_mark():
    methods = [label(method) for method in compare.METHODS]
    assert len({(family(m), shape(m, methods)) for m in methods}) == len(methods)
