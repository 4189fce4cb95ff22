"""The report of a conversion, layer by layer: data and JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from ghostify.errors import GhostifyError
from ghostify.fitting.driver import FitResult
from ghostify.graph.program import Convolution
from ghostify.modules.layout import GhostForm, GhostLayout, form_of
from ghostify.planning import cost
from ghostify.planning.planner import GhostRewrite, Plan, PruneRewrite, Skip
from ghostify.pruning.pruning_groups import conv_after_pruning
from ghostify.reconstruction.blockwise import BlockResult, Reconstruction

REPORT_KEY = "ghostify"


@dataclass(frozen=True)
class LayerReport:
    """One convolution. MACs are for the example inputs where `output_size` (H, W) is known, else for one position.

    `fit_error` and `holdout_error` are relative reconstruction errors, averaged over channels, on the calibration
    images and on those of them held out; `output_error` is the relative squared error of the model's outputs to expect
    from the latter. `channels` names the original's channels in the order that the ghost module makes them, intrinsic
    ones first. `reorders_output` says that the layer's output is put in order by an index, `activated` that its ghosts
    read activated maps. Where maps are left out, `kept_out_count` counts the outputs and `kept_in_count` the inputs
    that are left. A convolution that keeps its form with fewer maps has as many intrinsic ones as it makes, and a
    `width` of 0: no `form`.
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
        """The form of its ghosts; None where it has none, which `width` and `dw_size` store as 0."""
        return form_of(self.intrinsic, self.width, self.dw_size) if self.width else None

    @property
    def layout(self) -> GhostLayout | None:
        """The layout of its ghost module, or None."""
        return None if self.form is None else GhostLayout(self.outputs, self.intrinsic, self.form)

    @property
    def is_pruned(self) -> bool:
        """Whether it keeps its form, with fewer maps."""
        return self.kept_in_count is not None and self.form is None

    @property
    def outputs(self) -> int:
        """The maps that it makes, intrinsic ones and ghosts."""
        return self.weight_shape[0] if self.kept_out_count is None else self.kept_out_count


@dataclass(frozen=True)
class Report:
    """All convolutions in order of use, whole-model MACs where known, images used, seconds of each part, and blocks.

    `missing_attributes` names methods and attributes of the original that the result has not. Errors of lines are those
    of the closed-form fit, before any reconstruction. `notes` are those of the plan.
    """

    layers: tuple[LayerReport, ...]
    macs_before: int | None
    macs_after: int | None
    images: int
    seconds: dict[str, float]
    reconstruction: Reconstruction | None = None
    missing_attributes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rewritten(self) -> int:
        return sum(line.skip_reason is None for line in self.layers)

    @property
    def fit_time(self) -> str:
        """How long the fit took, and on what."""
        total = sum(self.seconds.values())
        shares = ", ".join(f"{name} {spent / total:.0%}" for name, spent in self.seconds.items() if spent)
        return f"{total:.0f} s ({shares})" if total else "0 s"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings; channels as one string a line."""
        data = dataclasses.asdict(self)
        for line in data["layers"]:
            line["channels"] = " ".join(map(str, line["channels"]))
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of `to_dict`, also after JSON has made lists of tuples."""
        lines = []
        for item in data["layers"]:
            shape = {k: None if item[k] is None else tuple(item[k]) for k in ("weight_shape", "output_size")}
            channels = tuple(map(int, item.get("channels", "").split()))
            lines.append(LayerReport(**{**item, **shape, "channels": channels}))
        counts = {k: data[k] for k in ("macs_before", "macs_after", "images", "seconds")}
        done = data.get("reconstruction")
        if done is not None:
            blocks = tuple(BlockResult(**{**item, "layers": tuple(item["layers"])}) for item in done["blocks"])
            done = Reconstruction(**{**done, "blocks": blocks})
        return cls(
            tuple(lines),
            **counts,
            reconstruction=done,
            missing_attributes=tuple(data.get("missing_attributes", ())),
            notes=tuple(data.get("notes", ())),
        )


@dataclass(frozen=True)
class ConversionInfo:
    """What is kept with a converted model beside its layers: its report, and which model the original was.

    `source` is as in the saved folder: `name`, `arguments` and `input_size`, or whatever the caller of `save` gave.
    """

    report: Report
    source: dict[str, Any] | None = None


def report(module: nn.Module) -> Report:
    """The report of a model that `ghostify` made or `load` read; raises `GhostifyError` for any other."""
    return conversion_info(module).report


def conversion_info(module: nn.Module) -> ConversionInfo:
    """What is kept with a model that `ghostify` made or `load` read; raises `GhostifyError` for any other."""
    info = module.__dict__.get("meta", {}).get(REPORT_KEY)
    if not isinstance(info, ConversionInfo):
        raise GhostifyError(f"{type(module).__name__} carries no report: pass what ghostify() or load() returned")
    return info


def attach_report(module: nn.Module, made: Report, source: dict[str, Any] | None = None) -> nn.Module:
    """The module, carrying its report and source where torch.fx keeps what copies and pickles take along."""
    module.__dict__.setdefault("meta", {})[REPORT_KEY] = ConversionInfo(made, source)
    return module


def build_report(
    plan: Plan, fits: FitResult | None = None, reconstruction: Reconstruction | None = None, lost: tuple[str, ...] = ()
) -> Report:
    """The report of a plan, with the errors of its fits, and of its blocks, where they are done."""
    lines = tuple(_line(entry, fits) for entry in plan.entries)
    images, seconds = (0, {}) if fits is None else (fits.images, fits.seconds)
    return Report(lines, plan.macs_before, plan.macs_after, images, seconds, reconstruction, lost, plan.notes)


def _line(entry: GhostRewrite | PruneRewrite | Skip, fits: FitResult | None) -> LayerReport:
    conv = entry.conv
    places = cost.total_positions(conv.calls)
    before, bias = cost.conv_macs(conv), conv.outputs * conv.bias
    common: dict[str, Any] = {
        "name": conv.name,
        "conv_class": conv.conv_class,
        "weight_shape": (conv.outputs, conv.inputs // conv.groups, *conv.kernel),
        "output_size": _size(conv),
        "macs_before": before * (places or 1),
        "params_before": before + bias,
    }
    if isinstance(entry, Skip):
        same = {"macs_after": common["macs_before"], "params_after": common["params_before"]}
        return LayerReport(
            **common,
            **same,
            skip_reason=entry.reason,
            intrinsic=conv.outputs,
            width=0,
            dw_size=0,
            reorders_output=False,
        )
    fitted = None if fits is None else fits.weights.get(conv.name)
    left = conv if entry.kept_channels is None else conv_after_pruning(conv, entry.kept_channels)
    if entry.kept_channels is not None:
        common |= {"kept_out_count": left.outputs, "kept_in_count": left.inputs}
    common |= {
        "skip_reason": None,
        "macs_after": entry.macs_after * (places or 1),
        "params_after": entry.macs_after + left.outputs * conv.bias,
        "fit_error": _mean(None if fitted is None else fitted.fit_error),
        "holdout_error": _mean(None if fitted is None else fitted.holdout_error),
        "output_error": None if fitted is None else fitted.output_error,
    }
    if isinstance(entry, PruneRewrite):
        return LayerReport(**common, intrinsic=left.outputs, width=0, dw_size=0, reorders_output=False)
    weights = None if fits is None else fits.ghost(conv.name)
    ordered = weights is not None and bool((weights.channels.diff() == 1).all())
    stored = entry.layout.to_dict()
    return LayerReport(
        **common,
        intrinsic=stored["intrinsic"],
        width=stored["width"],
        dw_size=stored["dw_size"],
        reorders_output=entry.permutation_target is None and not ordered,
        activated=weights is not None and weights.activated,
        channels=() if weights is None else _originals(entry, weights.channels.tolist()),
    )


def _originals(entry: GhostRewrite, channels: list[int]) -> tuple[int, ...]:
    """The original's channels, from their places among those that are left."""
    keeps = None if entry.kept_channels is None else entry.kept_channels.kept_out
    return tuple(channels) if keeps is None else tuple(keeps[k] for k in channels)


def _size(conv: Convolution) -> tuple[int, int] | None:
    shape = conv.calls[0].output_shape if conv.calls else None
    return None if shape is None else (shape[-2], shape[-1])


def _mean(values: Any) -> float | None:
    return None if values is None else float(values.mean())
