"""The figure of the README: points of top-1 lost against milliseconds, ghostify and other methods, without training.

    python benchmarks/experiments/tradeoff_figure.py

Reads benchmarks/results/compare-*.json and draws every row of the shown methods whose milliseconds were measured, of
all trainings of the four Fashion-MNIST networks; losses are relative to the original of the same training. Writes
docs/images/tradeoff.png.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import altair
import vl_convert
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.cells import label
from benchmarks.lib.figures import FAMILIES, family, shape
from benchmarks.lib.tables import FIGURES, options, recorded

NETWORKS = {
    "resnet20": "ResNet-20, width 32",
    "resnet56": "ResNet-56, width 16",
    "vgg16": "VGG-16-BN",
    "mobilenet": "MobileNetV2, half width",
}
METHODS = [
    "ghostify, auto",
    "ghostify, auto with pruning",
    "channel pruning, least squares",
    "Torch-Pruning, magnitude",
    "Tucker",
    "low rank",
]
SLOWEST, LEAST_LOST = 1.3, 0.02
COLOURS = 64  # of the PNG file
TICKS = [0.02, 0.1, 0.3, 1, 3, 10, 30, 80]


def points(network: str) -> Iterator[dict[str, Any]]:
    """Method, share of the original's milliseconds, and points lost, for every row whose milliseconds were measured."""
    for result in (f"compare-{network}", f"compare-{network}-2"):
        rows = recorded(result)
        original = next(row["score"] for row in rows if row["how"] == "original")
        for row in rows:
            method = label(row.get("method", ""))
            if method in METHODS and row["latency"] is not None and row["latency"] <= SLOWEST:
                lost = max(LEAST_LOST, original - row["score"])
                yield {"method": method, "time": row["latency"], "lost": lost}


def panel(network: str, title: str) -> altair.Chart:
    """One network: a point for each row."""
    scale = altair.Scale(type="log", domain=[TICKS[0], TICKS[-1]], reverse=True)
    shapes = altair.Scale(domain=METHODS, range=[shape(m, METHODS) for m in METHODS])
    chart = altair.Chart(altair.Data(values=list(points(network)))).encode(
        x=altair.X(
            "time:Q",
            title="milliseconds, of the original's",
            axis=altair.Axis(format="%", values=[0.4, 0.6, 0.8, 1, 1.2]),
            scale=altair.Scale(domain=[0.28, SLOWEST]),
        ),
        y=altair.Y("lost:Q", title="top-1 points lost", scale=scale, axis=altair.Axis(values=TICKS, format="~g")),
        color=altair.Color(
            "method:N",
            scale=altair.Scale(domain=METHODS, range=[FAMILIES[family(m)] for m in METHODS]),
            legend=altair.Legend(title=None, orient="top", columns=3, labelLimit=300, symbolSize=110, symbolOpacity=1),
        ),
        shape=altair.Shape("method:N", scale=shapes),
    )
    return chart.mark_point(filled=True, size=110, opacity=0.85).properties(width=330, height=230, title=title)


def figure() -> altair.VConcatChart:
    """Two rows of two networks."""
    panels = [panel(network, title) for network, title in NETWORKS.items()]
    chart = altair.vconcat(altair.hconcat(*panels[:2]), altair.hconcat(*panels[2:]))
    return chart.configure_axis(labelFontSize=13, titleFontSize=13).configure_legend(labelFontSize=13)


def main() -> None:
    options(__doc__).parse_args()
    FIGURES.mkdir(exist_ok=True)
    file = FIGURES / "tradeoff.png"
    spec = figure().configure_title(fontSize=14).configure_view(stroke="#dddddd").to_json()
    drawn = Image.open(io.BytesIO(vl_convert.vegalite_to_png(spec, scale=2))).convert("RGB")
    drawn.quantize(COLOURS).save(file, optimize=True)
    print(file)


if __name__ == "__main__":
    main()
