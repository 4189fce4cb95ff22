"""The table of real.py: what was asked for beside what was measured, every row, and published results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.lib.cells import Row, label

PRODUCT, HEALED, ALONE, EARLIER = "ghostify", "ghostify, healed", "ghostify, ghosts alone", "ghostify, earlier"
FORECAST_FACTOR = 1.5
KINDS = {
    "agreement": "same top-1 as the original, %",
    "f1": "box F1, %",
    "drop": "points of top-1 lost",
    "data_free": "layers without a calibrated fit",
    "forecast": "forecast error over that on the test images, or its inverse, the largest",
}


@dataclass(frozen=True)
class Bar:
    """A limit for a measure of a method's rows: at least, or at most for what is better when smaller.

    `before` and `prototype` are the figures of the version and of the prototype from which the work started.
    """

    network: str
    share: float
    images: int
    measure: str
    limit: float | None
    before: str = ""
    prototype: str = ""
    method: str = PRODUCT

    @property
    def at_most(self) -> bool:
        return self.measure in ("drop", "data_free")

    def values(self, rows: Iterable[Row]) -> list[float]:
        """The measure of each seed."""
        key = (self.network, self.method, self.share, self.images)
        found = (row for row in rows if _key(row) == key)
        return [row[self.measure] for row in found if row.get(self.measure) is not None]

    def is_met(self, value: float) -> bool:
        return self.limit is None or (value <= self.limit if self.at_most else value >= self.limit)


BARS = (
    Bar("MobileNetV2", 0.875, 256, "agreement", 80, "45", "67"),
    Bar("MobileNetV2", 0.875, 1024, "agreement", 86),
    Bar("MobileNetV2", 0.75, 256, "agreement", None, "36", "48"),
    Bar("MobileNetV2", 0.75, 1024, "agreement", 72, "", "59"),
    Bar("MobileNetV2", 0.75, 1024, "agreement", 80, method=HEALED),
    Bar("EfficientNet-Lite0", 0.75, 256, "agreement", None, "49"),
    Bar("EfficientNet-Lite0", 0.75, 1024, "agreement", 75),
    Bar("CRAFT", 1 / 2, 128, "f1", 98.5, "98.2"),
    Bar("CRAFT", 1 / 3, 128, "f1", 96),
    Bar("ResNet-20", 1 / 4, 512, "drop", 0.5, "0.5"),
    Bar("ResNet-20", 1 / 8, 512, "drop", None),
    Bar("VGG-16-BN", 1 / 4, 512, "drop", 0.5, "0.5"),
    Bar("VGG-16-BN", 1 / 8, 512, "drop", None),
    Bar("demosaicking", 1 / 2, 256, "data_free", 0, "falls back"),
    Bar("demosaicking", 1 / 4, 256, "data_free", 0, "falls back"),
)
PUBLISHED = (
    ("low rank by SVD", "MobileNetV2, ImageNet", "12.5 % of the MACs", "15"),
    ("restoration of pruned filters", "ImageNet", "5 / 10 % of the filters", "4.4 / 18.5"),
    ("without training", "ResNet-18, ImageNet", "58 % of the MACs", "13"),
)
NOTE = """Published results without training, which are not measured here. Their loss is in points of top-1 on the
labelled validation images of ImageNet. Ours is disagreement with the original on unlabelled pictures. It counts every
changed answer, right or wrong, so it is larger than the loss of accuracy: compare only the order. Filters are not MACs:
without 5 % of the filters of every layer, about 90 % of the MACs are left."""
MEASURES: tuple[tuple[str, str, float, int], ...] = (
    ("share", "MACs %", 100, 1),
    ("agreement", "same top-1 %", 1, 1),
    ("confident", "where confident %", 1, 1),
    ("top5", "in top 5 %", 1, 1),
    ("f1", "box F1 %", 1, 1),
    ("psnr", "PSNR dB", 1, 2),
    ("error", "error, test", 1, 4),
    ("calibration_error", "error, calibration", 1, 4),
    ("forecast", "forecast error", 1, 4),
    ("measured", "error, holdout", 1, 4),
    ("forecast_agreement", "forecast same top-1 %", 1, 1),
    ("measured_agreement", "same top-1, holdout %", 1, 1),
    ("right", "right", 1, 1),
    ("drop", "points lost", 1, 2),
    ("data_free", "layers not calibrated", 1, 0),
    ("steps", "gradient steps", 1, 0),
    ("seconds", "seconds", 1, 0),
)


def real(rows: list[Row]) -> str:
    """The whole table in Markdown, of the rows of real.py."""
    parts = [_bars(rows)]
    for network in dict.fromkeys(row["network"] for row in rows):
        parts += [f"### {network}", _measured([row for row in rows if row["network"] == network])]
    return "\n\n".join([*parts, "### Published", NOTE, _published()])


def forecast_factor(row: Row) -> float | None:
    """The forecast error over that on the test images or its inverse, at least 1; None without a forecast of it.

    A forecast is made before gradient steps, so healed rows have none.
    """
    forecast, error = None if row.get("steps") else row.get("forecast"), row.get("error")
    return max(forecast / error, error / forecast) if forecast and error else None


def _bars(rows: list[Row]) -> str:
    lines = [_line(bar, bar.values(rows)) for bar in BARS]
    factors = [factor for factor in map(forecast_factor, rows) if factor is not None]
    worst = [f"{max(factors):.2f} ({len(factors)} rows)", _answer(max(factors) <= FORECAST_FACTOR)] if factors else []
    limit = f"<= {FORECAST_FACTOR}"
    lines.append(["every row with a forecast", KINDS["forecast"], "3 to 400", "1.2", limit, *(worst or ["", ""])])
    return _markdown(["", "measure", "before", "prototype", "bar", "measured", "met"], lines)


def _line(bar: Bar, values: list[float]) -> list[str]:
    healed = ", healed" if bar.method == HEALED else ""
    name = f"{bar.network}, {bar.share:.3g} of the MACs, {bar.images} images{healed}"
    limit = "" if bar.limit is None else f"{'<=' if bar.at_most else '>='} {bar.limit:g}"
    met = _answer(bar.is_met(statistics.mean(values))) if values and limit else ""
    return [name, KINDS[bar.measure], bar.before, bar.prototype, limit, _spread(values, 1), met]


def _answer(met: bool) -> str:
    return "yes" if met else "no"


def _measured(rows: list[Row]) -> str:
    """Means and standard deviations over the seeds, the cheapest last; only measures that some row has."""
    keys = sorted(dict.fromkeys(map(_key, rows)), key=lambda key: (-key[2], key[3]))
    shown = [m for m in MEASURES if any(row.get(m[0]) is not None for row in rows)]
    lines = []
    for key in keys:
        group = [row for row in rows if _key(row) == key]
        cells = [_spread(_values(group, name, scale), digits) for name, _, scale, digits in shown]
        lines.append([label(key[1]), str(key[3] or ""), str(len(group)), *cells])
    return _markdown(["", "images", "seeds", *(head for _, head, _, _ in shown)], lines)


def _values(rows: list[Row], measure: str, scale: float) -> list[float]:
    return [scale * row[measure] for row in rows if row.get(measure) is not None]


def _published() -> str:
    return _markdown(["", "network", "saved", "points of top-1 lost"], [list(row) for row in PUBLISHED])


def _key(row: Row) -> tuple[str, str, float, int]:
    return row["network"], row["method"], row["limit"], row["images"]


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.pstdev(values):.{digits}f}"


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])
