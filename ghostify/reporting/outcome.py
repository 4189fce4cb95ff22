"""The outcome of each convolution in words, the same in tables and charts."""

from __future__ import annotations

from typing_extensions import assert_never

from ghostify.evaluation.output_comparison import OutputComparison
from ghostify.modules.layout import Depthwise, Grouped, Pointwise
from ghostify.summary import LayerReport, Report

SKIPPED, DEPTHWISE, WIDER, PRUNED = "skipped", "depthwise ghosts", "wider ghosts", "pruned"


def outcome_of(layer: LayerReport) -> str:
    """The kind of outcome: one of `SKIPPED`, `DEPTHWISE`, `WIDER` and `PRUNED`."""
    if layer.skip_reason is not None:
        return SKIPPED
    match layer.form:
        case None:
            return PRUNED
        case Depthwise():
            return DEPTHWISE
        case Grouped() | Pointwise():
            return WIDER
        case _:
            assert_never(layer.form)


def describe_outcome(layer: LayerReport, *, counts: bool = True) -> str:
    """The skip reason of a convolution, or the form of its replacement.

    With `counts` the text gives the numbers of intrinsic maps and ghosts, else the kind of outcome.
    """
    if layer.skip_reason is not None:
        return layer.skip_reason
    activated = ", activated" if layer.activated else ""
    data_free = ", fitted without images" if layer.is_data_free else ""
    reordered = ", reordered" if layer.reorders_output else ""
    return _shape(layer, counts) + _width(layer) + activated + reordered + data_free


def _shape(layer: LayerReport, counts: bool) -> str:
    """The numbers of maps where `counts`, else the kind of outcome and the numbers of kept channels."""
    sizes = f"{layer.intrinsic} + {layer.outputs - layer.intrinsic}, d={layer.dw_size}"
    if not counts:
        kind = outcome_of(layer)
        return kind if layer.kept_in_count is None else f"{kind}: {layer.kept_in_count} to {layer.kept_out_count}"
    if layer.kept_in_count is None:
        return sizes
    return f"{layer.kept_in_count} maps to {layer.kept_out_count if layer.is_pruned else sizes}"


def _width(layer: LayerReport) -> str:
    """The number of intrinsic maps that each ghost reads, where it is more than one."""
    match layer.form:
        case None | Depthwise():
            return ""
        case Grouped() | Pointwise():
            return f", w={layer.width}"
        case _:
            assert_never(layer.form)


def describe_outputs(report: Report) -> list[str]:
    """The forecast and the measured error of the outputs, a line each where they are known."""
    lines = []
    if report.forecast is not None:
        count = report.measurements
        how = f", {count} candidate{'s' * (count != 1)} measured" if count else ""
        lines.append(f"forecast before the fit: {_outputs(report.forecast)}{how}")
    if report.measured is not None:
        lines.append(f"measured after the fit: {_outputs(report.measured)}")
    return lines


def _outputs(comparison: OutputComparison) -> str:
    agreement = "" if comparison.agreement is None else f", {comparison.agreement:.0f} % of the answers unchanged"
    return f"output error {comparison.error:.3g}{agreement} on {comparison.images} images"
