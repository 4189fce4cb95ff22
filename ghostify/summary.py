"""The report of a conversion, layer by layer: data and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from ghostify.arguments import a_module, public
from ghostify.deprecation import LAYER_FIELDS, REPORT_FIELDS, renamed_attributes
from ghostify.errors import GhostifyError
from ghostify.evaluation.output_comparison import OutputComparison
from ghostify.fitting.driver import FitResult
from ghostify.graph.program import Convolution
from ghostify.healing.distillation import HealingResult
from ghostify.modules.layout import GhostForm, GhostLayout, form_of
from ghostify.planning import cost
from ghostify.planning.planner import GhostRewrite, Plan, PruneRewrite, Skip
from ghostify.pruning.pruning_groups import conv_after_pruning
from ghostify.reconstruction.blockwise import Reconstruction
from ghostify.records import from_json

REPORT_KEY = "ghostify"


@renamed_attributes(LAYER_FIELDS)
@dataclass(frozen=True)
class LayerReport:
    """One convolution, or one pruned linear layer as a 1 x 1 convolution.

    MACs are for the example inputs where `output_size` (H, W) is known, else for one position.

    `fit_error` and `holdout_error` are relative reconstruction errors, averaged over channels, on the fitted
    calibration images and on the holdout; channels that hardly change the model's outputs count less. `output_error` is
    the relative squared error of the model's outputs that the holdout error predicts. `channels` are the original's
    channel indices in the order of the ghost module, intrinsic ones first.
    `reorders_output` says that a gather restores the channel order of the output, `activated` that the ghosts read
    activated maps. Where channels are pruned, `kept_out_count` and `kept_in_count` count the kept outputs and inputs. A
    convolution that is pruned only, or skipped, has no `form`: its `width` and `dw_size` are 0, and `intrinsic` is the
    number of its outputs.
    """

    name: str
    conv_class: str
    weight_shape: tuple[int, int, int, int]
    output_size: tuple[int, int] | None
    skip_reason: str | None
    intrinsic: int
    width: int
    dw_size: int
    reorders_output: bool
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    fit_error: float | None = None
    holdout_error: float | None = None
    activated: bool = False
    output_error: float | None = None
    channels: tuple[int, ...] = ()
    kept_out_count: int | None = None
    kept_in_count: int | None = None

    @property
    def form(self) -> GhostForm | None:
        """The form of its ghosts; None without ghosts, which `width` and `dw_size` store as 0."""
        return form_of(self.intrinsic, self.width, self.dw_size) if self.width else None

    @property
    def layout(self) -> GhostLayout | None:
        """The layout of its ghost module, or None."""
        return None if self.form is None else GhostLayout(self.outputs, self.intrinsic, self.form)

    @property
    def is_data_free(self) -> bool:
        """Whether its weights are those without images, although there were some: the fit to them was worse."""
        return self.fit_error is None and self.holdout_error is not None

    @property
    def is_pruned(self) -> bool:
        """Whether it is pruned and has no ghosts."""
        return self.kept_in_count is not None and self.form is None

    @property
    def outputs(self) -> int:
        """The number of its output maps, intrinsic ones and ghosts."""
        return self.weight_shape[0] if self.kept_out_count is None else self.kept_out_count


@renamed_attributes(REPORT_FIELDS)
@dataclass(frozen=True)
class Report:
    """All convolutions in order of first use, then the pruned linear layers; the model's MACs where known, calibration
    images and seconds by stage.

    Errors of layers are those of the closed-form fit, before any `reconstruction` and `healing`. `missing_attributes`
    names methods and attributes of the original that the result lacks. `notes` are those of the plan and of the fit,
    `macs_limit` the number of MACs that a budget permitted. `forecast` compares the outputs of the simulated plan with
    the original's before the fit, `measured` those of the result, both on images that nothing was fitted to;
    `measurements` counts the candidates that were simulated to choose the plan.
    """

    layers: tuple[LayerReport, ...]
    macs_before: int | None
    macs_after: int | None
    images: int
    seconds: dict[str, float]
    reconstruction: Reconstruction | None = None
    missing_attributes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    macs_limit: int | None = None
    forecast: OutputComparison | None = None
    measured: OutputComparison | None = None
    measurements: int = 0
    healing: HealingResult | None = None

    @property
    def rewritten(self) -> int:
        """The number of layers that became ghost modules or were pruned."""
        return sum(layer.skip_reason is None for layer in self.layers)

    @property
    def fit_time(self) -> str:
        """The duration of the fit, with the share of each stage."""
        total = sum(self.seconds.values())
        shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in self.seconds.items() if seconds)
        return f"{total:.0f} s ({shares})" if total else "0 s"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data; the channels of each layer as one string."""
        data = asdict(self)
        for layer in data["layers"]:
            layer["channels"] = " ".join(map(str, layer["channels"]))
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of `to_dict`, also after JSON has made lists of tuples; raises `GhostifyError` for other data."""
        layers = [_with_channels(layer) for layer in data["layers"]]
        return from_json(cls, {**data, "layers": layers}, "report")


def _with_channels(layer: dict[str, Any]) -> dict[str, Any]:
    return {**layer, "channels": list(map(int, layer.get("channels", "").split()))}


@dataclass(frozen=True)
class ConversionInfo:
    """The report of a converted model, and the source of its original.

    `source` is as in the saved folder: `name`, `arguments` and `input_size`, or other data that `save` was given.
    """

    report: Report
    source: dict[str, Any] | None = None


@public(module=a_module)
def report(module: nn.Module) -> Report:
    """The report of a model that `ghostify` or `load` returned; raises `GhostifyError` for any other."""
    return conversion_info(module).report


def conversion_info(module: nn.Module) -> ConversionInfo:
    """The report and source of a model that `ghostify` or `load` returned; raises `GhostifyError` for any other."""
    info = module.__dict__.get("meta", {}).get(REPORT_KEY)
    if not isinstance(info, ConversionInfo):
        raise GhostifyError(f"{type(module).__name__}: has no report. Pass a model that ghostify() or load() returned.")
    return info


def attach_report(module: nn.Module, report: Report, source: dict[str, Any] | None = None) -> nn.Module:
    """The module, with its report and source in `meta`, which torch.fx includes in copies and pickles."""
    module.__dict__.setdefault("meta", {})[REPORT_KEY] = ConversionInfo(report, source)
    return module


def build_report(
    plan: Plan,
    fits: FitResult | None = None,
    reconstruction: Reconstruction | None = None,
    missing_attributes: tuple[str, ...] = (),
    measured: OutputComparison | None = None,
    healing: HealingResult | None = None,
) -> Report:
    """The report of a plan, with the errors of its fits, its reconstruction, its healing and its outputs, if any."""
    layers = tuple(_layer_report(entry, fits) for entry in plan.entries)
    images, seconds = (0, {}) if fits is None else (fits.images, fits.seconds)
    notes = plan.notes if fits is None else (*plan.notes, *fits.notes)
    return Report(
        layers,
        plan.macs_before,
        plan.macs_after,
        images,
        seconds,
        reconstruction,
        missing_attributes,
        notes,
        plan.macs_limit,
        plan.forecast,
        measured,
        plan.measurements,
        healing,
    )


def _layer_report(entry: GhostRewrite | PruneRewrite | Skip, fits: FitResult | None) -> LayerReport:
    conv = entry.conv
    positions = cost.total_positions(conv.calls) or 1
    macs_per_position = cost.conv_macs(conv)
    macs_before, params_before = macs_per_position * positions, cost.layer_parameters(macs_per_position, conv)
    unchanged = LayerReport(
        name=conv.name,
        conv_class=conv.conv_class,
        weight_shape=(conv.outputs, conv.inputs // conv.groups, *conv.kernel),
        output_size=_output_size(conv),
        skip_reason=None,
        intrinsic=conv.outputs,
        width=0,
        dw_size=0,
        reorders_output=False,
        macs_before=macs_before,
        macs_after=macs_before,
        params_before=params_before,
        params_after=params_before,
    )
    if isinstance(entry, Skip):
        return replace(unchanged, skip_reason=entry.reason)
    changed = _with_costs_and_errors(unchanged, entry, positions, fits)
    return changed if isinstance(entry, PruneRewrite) else _with_ghosts(changed, entry, fits)


def _with_costs_and_errors(
    layer: LayerReport, entry: GhostRewrite | PruneRewrite, positions: int, fits: FitResult | None
) -> LayerReport:
    conv, kept = entry.conv, entry.kept_channels
    pruned = conv if kept is None else conv_after_pruning(conv, kept)
    weights = None if fits is None else fits.weights.get(conv.name)
    return replace(
        layer,
        intrinsic=pruned.outputs,
        macs_after=entry.macs_after * positions,
        params_after=cost.layer_parameters(entry.macs_after, pruned),
        fit_error=None if weights is None else _mean(weights.fit_error),
        holdout_error=None if weights is None else _mean(weights.holdout_error),
        output_error=None if weights is None else weights.output_error,
        kept_out_count=None if kept is None else pruned.outputs,
        kept_in_count=None if kept is None else pruned.inputs,
    )


def _with_ghosts(layer: LayerReport, entry: GhostRewrite, fits: FitResult | None) -> LayerReport:
    weights = None if fits is None else fits.ghost(entry.conv.name)
    in_order = weights is not None and bool((weights.channels.diff() == 1).all())
    layout = entry.layout.to_dict()
    return replace(
        layer,
        intrinsic=layout["intrinsic"],
        width=layout["width"],
        dw_size=layout["dw_size"],
        reorders_output=entry.permutation_target is None and not in_order,
        activated=weights is not None and weights.activated,
        channels=() if weights is None else _original_channels(entry, weights.channels.tolist()),
    )


def _original_channels(entry: GhostRewrite, channels: list[int]) -> tuple[int, ...]:
    """The original's channel indices of `channels`, which count the kept ones."""
    kept_out = None if entry.kept_channels is None else entry.kept_channels.kept_out
    return tuple(channels) if kept_out is None else tuple(kept_out[k] for k in channels)


def _output_size(conv: Convolution) -> tuple[int, int] | None:
    shape = conv.calls[0].output_shape if conv.calls else None
    return None if shape is None else (shape[-2], shape[-1])


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.mean())
