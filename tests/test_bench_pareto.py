"""The comparison's pictures: what is drawn of which rows, and that it becomes an SVG with a mark for every method."""

import pytest

from benchmarks.experiments import compare, pareto
from benchmarks.lib.catalogue import label
from benchmarks.lib.figures import family, shape


def rows(methods, *, taught):
    yield {"how": "original", "score": 90.0, "macs": 1.0, "latency": 1.0}
    for method in methods:
        for seed, score in enumerate((89.0, 88.0)):
            limit = {"limit": ["macs", 0.5], "seed": seed, "macs": 0.5, "latency": 0.6 + seed / 10}
            yield {"how": f"{method}, seed {seed}", "method": method, "score": score, "taught": taught, **limit}


def test_a_point_is_the_mean_of_the_seeds_with_their_range():
    drawn = list(pareto.points(list(rows(["low rank"], taught=90.5))))
    untaught, by_time, taught, _ = drawn
    assert (untaught["lost"], untaught["least"], untaught["most"]) == (1.5, 1.0, 2.0)
    assert by_time["share"] == pytest.approx(0.65)
    assert taught["lost"] == 0  # better than the original: on the edge


def test_what_was_not_trained_has_no_points_there():
    assert {p["stage"] for p in pareto.points(list(rows(["Tucker"], taught=None)))} == {"not trained"}


def test_the_picture_names_every_method():
    svg = pareto.picture(list(rows(compare.METHODS, taught=89.5)))
    assert svg.startswith("<svg")
    assert all(label(method) in svg for method in compare.METHODS)


def test_every_method_has_a_mark_of_its_own():
    methods = [label(method) for method in compare.METHODS]
    assert len({(family(m), shape(m, methods)) for m in methods}) == len(methods)
