"""A picture of each comparison: points lost against multiply-accumulates and milliseconds, before training and after.

    python benchmarks/pareto.py

Reads benchmarks/results/compare-NETWORK.json, writes docs/images/compare-NETWORK.svg: a point is the mean over the
seeds, the bar through it their range; up and to the left is better.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import altair
import vl_convert
from tables import Row, recorded

PICTURES = Path(__file__).parent.parent / "docs/images"
COSTS = {"macs": "multiply-accumulates", "latency": "milliseconds"}
STAGES = {"score": "not trained", "taught": "one epoch of distillation"}
COLOURS = {"ghostify": "#0b6e99", "other ghosts": "#7fb7d1", "cut channels": "#b45309", "factored filters": "#6b7280"}
SHAPES = ("circle", "square", "triangle-up", "diamond")


def kind(method: str) -> str:
    """Which of COLOURS a method of compare.py belongs to."""
    if method.startswith("ghostify"):
        return "ghostify"
    if method.startswith("ghost,"):
        return "other ghosts"
    return "cut channels" if method.startswith(("Torch-Pruning", "channels")) else "factored filters"


def points(found: list[Row]) -> Iterator[dict[str, Any]]:
    """What is drawn: for each method, limit and stage of training the points lost, over the seeds."""
    best = next(row["score"] for row in found if row["how"] == "original")
    keys = dict.fromkeys((row["method"], tuple(row["limit"])) for row in found if "method" in row)
    for method, limit in keys:
        own = [row for row in found if row.get("method") == method and tuple(row["limit"]) == limit]
        for stage, title in STAGES.items():
            lost = [best - row[stage] for row in own if row.get(stage) is not None]
            for cost, name in COSTS.items() if lost else ():
                shares = [row[cost] for row in own if row[cost] is not None]
                if not shares:
                    continue
                yield {
                    "method": method,
                    "kind": kind(method),
                    "stage": title,
                    "cost": name,
                    "share": statistics.mean(shares),
                    "lost": max(0.0, statistics.mean(lost)),
                    "least": max(0.0, min(lost)),
                    "most": max(0.0, max(lost)),
                }


def chart(drawn: list[dict[str, Any]], methods: list[str]) -> altair.LayerChart:
    """Points and ranges over one share of the cost; a method has its kind's colour and a shape of its own in that."""
    own = {m: [other for other in methods if kind(other) == kind(m)].index(m) for m in methods}
    colours = altair.Scale(domain=methods, range=[COLOURS[kind(m)] for m in methods])
    shapes = altair.Scale(domain=methods, range=[SHAPES[own[m] % len(SHAPES)] for m in methods])
    base = altair.Chart(altair.Data(values=drawn)).encode(
        x=altair.X("share:Q", title=None, axis=altair.Axis(format="%", tickCount=5)),
        color=altair.Color("method:N", title=None, scale=colours),
    )
    axis = altair.Axis(values=[0, 0.1, 0.3, 1, 3, 10, 30, 80], format="~g")
    scale = altair.Scale(type="symlog", constant=0.1, reverse=True)
    ranges = base.mark_rule(opacity=0.4).encode(y=altair.Y("least:Q", scale=scale), y2="most:Q")
    lost = altair.Y("lost:Q", title="points lost", scale=scale, axis=axis)
    shape = altair.Shape("method:N", title=None, scale=shapes)
    return ranges + base.mark_point(filled=True, size=60).encode(y=lost, shape=shape)


def picture(found: list[Row]) -> str:
    """The comparison as SVG: a panel for each cost and each stage of training that was measured."""
    drawn = list(points(found))
    methods = list(dict.fromkeys(p["method"] for p in drawn))
    stages = [stage for stage in STAGES.values() if any(p["stage"] == stage for p in drawn)]
    rows = [
        altair.hconcat(
            *(
                chart([p for p in drawn if p["stage"] == stage and p["cost"] == cost], methods).properties(
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
    PICTURES.mkdir(exist_ok=True)
    for name in sorted(file.stem for file in (Path(__file__).parent / "results").glob("compare-*.json")):
        path = PICTURES / f"{name}.svg"
        path.write_text(picture(recorded(name)))
        print(path)


if __name__ == "__main__":
    main()
