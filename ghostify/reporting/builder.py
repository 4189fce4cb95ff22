"""The report page of a converted model: counts, latencies, comparison with the original, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ghostify.errors import GhostifyError
from ghostify.evaluation.comparison import Comparison, compare_models, has_tensor_output
from ghostify.graph.tracing import trace
from ghostify.io.atomic import check_output_file
from ghostify.planning import cost
from ghostify.reporting.analysis import LatencyPairs, layer_costs
from ghostify.reporting.ghost_pictures import is_picturable, picture_ghosts
from ghostify.reporting.html import Page, TotalRow, is_page, write_page
from ghostify.summary import LayerReport, Report, report
from ghostify.text import format_count
from ghostify.timing.latency import interleaved_latency, layer_latency
from ghostify.timing.timer import LatencyTimer

LAYERS_PICTURED = 3
NAMES_LISTED = 3


def write_report(
    module: nn.Module,
    file: str | Path,
    *,
    original: nn.Module | None = None,
    example_inputs: Any = None,
    images: Sequence[Tensor] = (),
    labels: Tensor | None = None,
    layers: Sequence[str] | None = None,
    runtime: str | None = "eager",
    curve: Sequence[Mapping[str, Any]] = (),
    title: str = "",
    overwrite: bool = False,
) -> Path:
    """Write the report of a converted model as one HTML page that needs no network.

    With the `original` and `example_inputs`, both models and every rewritten layer are timed in `runtime` (None: no
    timing). On batches of `images` both are compared where their output is one tensor, with `labels` (N) by top-1 too,
    and the maps of `layers` (default: those with the largest error) are shown next to the original's. `curve` is that
    of `frontier`, as dicts. An existing file is replaced if it is such a page, any other only with `overwrite`. Raises
    `GhostifyError` for a model without a report, for layers that cannot be shown, and for files that are not replaced.
    """
    check_output_file(file, is_page, overwrite=overwrite)
    summary = report(module)
    totals = _count_rows(module, original, summary)
    latencies: LatencyPairs = {}
    if original is not None and images and has_tensor_output(module, images[0]):
        totals += _comparison_rows(compare_models(module, original, images, labels))
    if original is not None and runtime is not None and example_inputs is not None:
        with LatencyTimer(runtime) as timer:
            before, after = interleaved_latency([original, module], example_inputs, timer)
            latencies = layer_latencies(original, summary, example_inputs, timer)
        totals.append(TotalRow(f"latency in ms, deployed, {runtime}", f"{before:.2f}", f"{after:.2f}", after / before))
    pictures = []
    if original is not None and images:
        pictures = [
            picture_ghosts(module, original, layer, images)
            for layer in _layers_to_picture(module, original, summary, layers)
        ]
    elif layers:
        raise GhostifyError("layers: their maps are shown next to the original's. Pass original and images, too.")
    return write_page(Page(title or type(module).__name__, summary, totals, latencies, pictures, curve), file)


def layer_latencies(original: nn.Module, summary: Report, example_inputs: Any, timer: LatencyTimer) -> LatencyPairs:
    """Latencies (ms) of the calls of each ghost module without pruning in one forward: before and after, by name."""
    program, latencies = trace(original, example_inputs), {}
    convs = {conv.name: conv for conv in program.convolutions}
    for layer in summary.layers:
        if layer.skip_reason is None and layer.kept_in_count is None and layer.name in convs:
            before, after = layer_latency(program.conv(layer.name), convs[layer.name], [None, layer.layout], timer)
            latencies[layer.name] = (before, after)
    return latencies


def _count_rows(module: nn.Module, original: nn.Module | None, summary: Report) -> list[TotalRow]:
    rows = []
    if summary.macs_before is not None and summary.macs_after is not None:
        rows.append(_count_row("multiply-accumulates", summary.macs_before, summary.macs_after))
    if original is not None:
        for quantity, count in (("parameters", cost.count_parameters), ("bytes of weights", _count_bytes)):
            rows.append(_count_row(quantity, count(original), count(module)))
    return rows


def _count_row(quantity: str, before: int, after: int) -> TotalRow:
    return TotalRow(quantity, format_count(before), format_count(after), after / before)


def _count_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in chain(module.parameters(), module.buffers()))


def _comparison_rows(comparison: Comparison) -> list[TotalRow]:
    rows, images = [], f"on {comparison.images} images"
    if comparison.top1 is not None and comparison.original_top1 is not None:
        rows.append(TotalRow(f"top-1 {images}", f"{comparison.original_top1:.2f} %", f"{comparison.top1:.2f} %"))
    if comparison.agreement is not None:
        rows.append(TotalRow(f"agreement {images}", "", f"{comparison.agreement:.1f} %"))
    return [*rows, TotalRow(f"output error {images}", "", f"{comparison.error:.4f}")]


def _layers_to_picture(
    module: nn.Module, original: nn.Module, summary: Report, names: Sequence[str] | None
) -> list[LayerReport]:
    """The layers of these names, or those with the largest error."""
    if names is None:
        by_error = (c.layer for c in layer_costs(summary) if is_picturable(module, original, c.layer))
        return list(islice(by_error, LAYERS_PICTURED))
    by_name = {layer.name: layer for layer in summary.layers}
    for name in names:
        if name not in by_name:
            examples = ", ".join(list(by_name)[:NAMES_LISTED])
            raise GhostifyError(
                f"{name}: is not a convolution of the report. "
                f"Choose from {examples}, ... (`ghostify report` lists all)."
            )
    return [by_name[name] for name in names]
