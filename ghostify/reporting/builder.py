"""The report page of a converted model: counts, latencies, comparison with the original, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ghostify.arguments import (
    a_flag,
    a_mapping,
    a_model,
    a_number,
    a_path,
    a_sequence,
    a_text,
    anything,
    instance_of,
    optional,
    public,
)
from ghostify.errors import GhostifyError
from ghostify.evaluation.comparison import Comparison, compare_models, has_tensor_output
from ghostify.graph.inputs import bind_example, run_example
from ghostify.graph.linear_layers import as_maps
from ghostify.graph.model_copy import unwrapped_model
from ghostify.graph.modes import eval_mode
from ghostify.graph.paths import resolve_attribute
from ghostify.graph.tracing import trace
from ghostify.io.atomic import check_output_file
from ghostify.planning import cost
from ghostify.reporting.analysis import LatencyPairs, layer_costs
from ghostify.reporting.ghost_pictures import is_picturable, picture_ghosts
from ghostify.reporting.html import Page, TotalRow, is_page, write_page
from ghostify.runtimes.registry import a_runtime
from ghostify.summary import LayerReport, Report, report
from ghostify.text import format_count, format_shape, format_value
from ghostify.timing.latency import interleaved_latency, layer_latency
from ghostify.timing.timer import LatencyTimer

LAYERS_PICTURED = 3
NAMES_LISTED = 3


def _image_batches(name: str, value: Any) -> Sequence[Tensor]:
    """Batches of images; a single tensor is one batch; a check of arguments."""
    batches = (value,) if isinstance(value, Tensor) else value
    if not isinstance(batches, list | tuple) or not all(isinstance(b, Tensor) and b.dim() and len(b) for b in batches):
        raise GhostifyError(f"{name}: is {format_value(value)}, not a list of batches. Pass tensors of N x C x H x W.")
    return batches


def _a_curve(name: str, value: Any) -> Sequence[Mapping[str, Any]]:
    """The points of a frontier as dicts; a check of arguments."""
    remedy = "Pass [point.to_dict() for point in frontier(...)]."
    points: Sequence[Mapping[str, Any]] = a_sequence(a_mapping(remedy), remedy)(name, value)
    for number, point in enumerate(points):
        shares, error = point.get("shares"), point.get("error")
        if not isinstance(shares, Mapping) or not shares:
            raise GhostifyError(f"{name}[{number}]: has no shares of costs. {remedy}")
        for key, share in (*shares.items(), ("error", error)):
            a_number(0, remedy=remedy)(f"{name}[{number}] {key}", share)
    return points


@public(
    module=a_model,
    file=a_path,
    original=optional(a_model),
    example_inputs=anything,
    images=_image_batches,
    labels=optional(instance_of(Tensor, "Pass one class number for each image.")),
    layers=optional(a_sequence(a_text, "Pass the names of layers.")),
    runtime=optional(a_runtime),
    curve=_a_curve,
    title=a_text,
    overwrite=a_flag,
)
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
    `GhostifyError` for a model without a report, for another original than that of the report, for labels that are not
    one class for each image, for layers that cannot be shown, and for files that are not replaced.
    """
    check_output_file(file, is_page, overwrite=overwrite)
    summary = report(module)
    if original is not None:
        original = unwrapped_model(original)
        _check_original(original, summary)
    if labels is not None and (original is None or not images):
        raise GhostifyError("labels: are compared with what both models predict. Pass original and images, too.")
    if example_inputs is not None:
        with eval_mode(module):
            run_example(module, bind_example(module, example_inputs))
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


def _check_original(original: nn.Module, summary: Report) -> None:
    """Raises `GhostifyError` where the layers of a report are not those of the original."""
    for layer in summary.layers:
        if not all(layer.weight_shape):  # a weight that a forward computes
            continue
        try:
            holder = resolve_attribute(original, layer.name)
        except AttributeError as error:
            raise GhostifyError(f"original: has no layer {layer.name}. Pass the model that was converted.") from error
        weight = getattr(holder, "weight", holder)
        if isinstance(weight, Tensor) and tuple(as_maps(weight).shape) != layer.weight_shape:
            shapes = format_shape(weight.shape), format_shape(layer.weight_shape)
            raise GhostifyError(
                f"original: the weight of {layer.name} is {shapes[0]}, in the report {shapes[1]}. "
                "Pass the model that was converted."
            )


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
