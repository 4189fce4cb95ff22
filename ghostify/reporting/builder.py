"""From a converted model to the page that shows it: what is counted, timed, judged and pictured on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ghostify.errors import GhostifyError
from ghostify.evaluation.comparison import Comparison, compare_models, has_tensor_output
from ghostify.graph.tracing import trace
from ghostify.planning import cost
from ghostify.reporting.analysis import Times, layer_costs
from ghostify.reporting.ghost_pictures import is_picturable, picture_ghosts
from ghostify.reporting.html import Page, TotalRow, write_page
from ghostify.summary import LayerReport, Report, report
from ghostify.text import format_count
from ghostify.timing.latency import interleaved_latency, layer_latency
from ghostify.timing.timer import LatencyTimer

PICTURED = 3


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
) -> Path:
    """Write what was done to a converted model as one HTML page that needs no network.

    With the `original` and `example_inputs`, both models and every rewritten layer are timed in `runtime` (None: not at
    all). On batches of `images` both are compared where their output is one tensor, by `labels` (N) too where there are
    any, and the maps of `layers` (default: those that cost the most) are shown beside the original's. `curve` is that
    of `frontier`, as dicts. Raises `GhostifyError` for a model without a report, and for layers that cannot be shown.
    """
    found = report(module)
    totals = _counts(module, original, found)
    times: Times = {}
    if original is not None and images and has_tensor_output(module, images[0]):
        totals += _scores(compare_models(module, original, images, labels))
    if original is not None and runtime is not None and example_inputs is not None:
        with LatencyTimer(runtime) as clock:
            before, after = interleaved_latency([original, module], example_inputs, clock)
            times = layer_latencies(original, found, example_inputs, clock)
        totals.append(TotalRow(f"ms, deployed, {runtime}", f"{before:.2f}", f"{after:.2f}", after / before))
    shown = []
    if original is not None and images:
        shown = [
            picture_ghosts(module, original, line, images)
            for line in _layers_to_picture(module, original, found, layers)
        ]
    elif layers:
        raise GhostifyError("layers are shown on images, beside the original: pass both")
    return write_page(Page(title or type(module).__name__, found, totals, times, shown, curve), file)


def layer_latencies(original: nn.Module, found: Report, example_inputs: Any, clock: LatencyTimer) -> Times:
    """Milliseconds of every rewritten layer's calls in one forward, before and after, by its name."""
    program, times = trace(original, example_inputs), {}
    convs = {conv.name: conv for conv in program.convolutions}
    for line in found.layers:
        if line.skip_reason is None and line.kept_in_count is None and line.name in convs:
            taken = layer_latency(program.conv(line.name), convs[line.name], [None, line.layout], clock)
            times[line.name] = (taken[0], taken[1])
    return times


def _counts(module: nn.Module, original: nn.Module | None, found: Report) -> list[TotalRow]:
    totals = []
    if found.macs_before is not None and found.macs_after is not None:
        counts = format_count(found.macs_before), format_count(found.macs_after)
        totals.append(TotalRow("multiply-accumulates", *counts, found.macs_after / found.macs_before))
    if original is not None:
        for what, count in (("parameters", cost.count_parameters), ("bytes of weights", _bytes)):
            before, after = count(original), count(module)
            totals.append(TotalRow(what, format_count(before), format_count(after), after / before))
    return totals


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in chain(module.parameters(), module.buffers()))


def _scores(found: Comparison) -> list[TotalRow]:
    totals, on = [], f"on {found.images} images"
    if found.top1 is not None and found.original_top1 is not None:
        totals.append(TotalRow(f"top-1 {on}", f"{found.original_top1:.2f} %", f"{found.top1:.2f} %"))
    if found.agreement is not None:
        totals.append(TotalRow(f"same answers {on}", "", f"{found.agreement:.1f} %"))
    return [*totals, TotalRow(f"outputs' error {on}", "", f"{found.error:.4f}")]


def _layers_to_picture(
    module: nn.Module, original: nn.Module, found: Report, layers: Sequence[str] | None
) -> list[LayerReport]:
    """The lines of these layers, or of those that cost the most."""
    if layers is None:
        able = (c.line for c in layer_costs(found) if is_picturable(module, original, c.line))
        return list(islice(able, PICTURED))
    by_name = {line.name: line for line in found.layers}
    for name in layers:
        if name not in by_name:
            raise GhostifyError(f"{name}: is no convolution of the report: it has {', '.join(list(by_name)[:3])}, ...")
    return [by_name[name] for name in layers]
