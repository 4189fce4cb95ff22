"""A figure of each comparison: points lost against multiply-accumulates and milliseconds, before and after training.

    python benchmarks/experiments/pareto.py

Reads benchmarks/results/compare-NETWORK.json, writes docs/images/compare-NETWORK.svg: a point is the mean over the
seeds, the bar through it their range; up and to the left is better.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import altair
import vl_convert

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.cells import label
from benchmarks.lib.figures import FAMILIES, family, shape
from benchmarks.lib.tables import FIGURES, RESULTS, Row, options, recorded

COSTS = {"macs": "multiply-accumulates", "latency": "milliseconds"}
STAGES = {"score": "not trained", "taught": "one epoch of distillation"}


def points(recorded_rows: list[Row]) -> Iterator[dict[str, Any]]:
    """For each method, limit and stage of training: mean, minimum and maximum of the points lost over the seeds."""
    best = next(row["score"] for row in recorded_rows if row["how"] == "original")
    keys = dict.fromkeys((row["method"], tuple(row["limit"])) for row in recorded_rows if "method" in row)
    for method, limit in keys:
        matching = [row for row in recorded_rows if row.get("method") == method and tuple(row["limit"]) == limit]
        for stage, title in STAGES.items():
            lost = [best - row[stage] for row in matching if row.get(stage) is not None]
            for cost, name in COSTS.items() if lost else ():
                shares = [row[cost] for row in matching if row[cost] is not None]
                if not shares:
                    continue
                yield {
                    "method": label(method),
                    "stage": title,
                    "cost": name,
                    "share": statistics.mean(shares),
                    "lost": max(0.0, statistics.mean(lost)),
                    "minimum": max(0.0, min(lost)),
                    "maximum": max(0.0, max(lost)),
                }


def chart(shown: list[dict[str, Any]], methods: list[str]) -> altair.LayerChart:
    """Points and ranges over one share of the cost; colours are families of methods, shapes methods."""
    colours = altair.Scale(domain=methods, range=[FAMILIES[family(m)] for m in methods])
    shapes = altair.Scale(domain=methods, range=[shape(m, methods) for m in methods])
    base = altair.Chart(altair.Data(values=shown)).encode(
        x=altair.X("share:Q", title=None, axis=altair.Axis(format="%", tickCount=5)),
        color=altair.Color("method:N", title=None, scale=colours),
    )
    axis = altair.Axis(values=[0, 0.1, 0.3, 1, 3, 10, 30, 80], format="~g")
    scale = altair.Scale(type="symlog", constant=0.1, reverse=True)
    ranges = base.mark_rule(opacity=0.4).encode(y=altair.Y("minimum:Q", scale=scale), y2="maximum:Q")
    lost = altair.Y("lost:Q", title="points lost", scale=scale, axis=axis)
    marks = altair.Shape("method:N", title=None, scale=shapes)
    return ranges + base.mark_point(filled=True, size=60).encode(y=lost, shape=marks)


def picture(recorded_rows: list[Row]) -> str:
    """The comparison as SVG: a panel for each cost and each stage of training that was measured."""
    shown = list(points(recorded_rows))
    methods = list(dict.fromkeys(p["method"] for p in shown))
    stages = [stage for stage in STAGES.values() if any(p["stage"] == stage for p in shown)]
    rows = [
        altair.hconcat(
            *(
                chart([p for p in shown if p["stage"] == stage and p["cost"] == cost], methods).properties(
                    width=320, height=240, title=f"{stage}, of the original's {cost}"
                )
                for cost in COSTS.values()
            )
        )
        for stage in stages
    ]
    spec = altair.vconcat(*rows).configure_view(stroke="#dddddd").to_json()
    return str(vl_convert.vegalite_to_svg(spec))


def main() -> None:
    options(__doc__).parse_args()
    FIGURES.mkdir(exist_ok=True)
    for name in sorted(file.stem for file in RESULTS.glob("compare-*.json")):
        path = FIGURES / f"{name}.svg"
        path.write_text(picture(recorded(name)))
        print(path)


if __name__ == "__main__":
    main()
