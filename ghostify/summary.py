"""What was done to a model, layer by layer: data, tables, JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from torch import nn
from typing_extensions import assert_never

from ghostify.errors import GhostifyError
from ghostify.fitting.driver import Fits
from ghostify.graph.program import Convolution
from ghostify.modules.layout import Depthwise, GhostForm, GhostLayout, Grouped, Pointwise, form_of
from ghostify.planning import cost
from ghostify.planning.planner import Narrow, Plan, Rewrite, Skip
from ghostify.pruning.pruning_groups import left_of
from ghostify.reconstruction.blockwise import Rebuilt, Reconstruction
from ghostify.text import format_shape

META = "ghostify"
UNCHANGED, DEPTHWISE, WIDER, PRUNED = "left as it is", "depthwise ghosts", "wider ghosts", "fewer maps"


@dataclass(frozen=True)
class Line:
    """One convolution. MACs are for the example inputs where `output` (H, W) is known, else for one position.

    `error` and `held_out` are relative reconstruction errors, averaged over channels, on the calibration images and on
    those of them held out; `felt` is the relative squared error of the model's outputs to expect from the latter.
    `channels` names the original's channels in the order that the ghost module makes them, intrinsic ones first.
    `gather` says that the layer's output is put in order by an index, `activated` that its ghosts read activated maps.
    Where maps are left out, `makes` counts the outputs and `reads` the inputs that are left. A convolution that keeps
    its form with fewer maps has as many intrinsic ones as it makes, and a `width` of 0: no `form`.
    """

    name: str
    kind: str
    filters: tuple[int, int, int, int]
    output: tuple[int, int] | None
    reason: str | None
    intrinsic: int
    width: int
    dw_size: int
    gather: bool
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    error: float | None = None
    held_out: float | None = None
    activated: bool = False
    felt: float | None = None
    channels: tuple[int, ...] = ()
    makes: int | None = None
    reads: int | None = None

    @property
    def form(self) -> GhostForm | None:
        """The form of its ghosts; None where it has none, which `width` and `dw_size` store as 0."""
        return form_of(self.intrinsic, self.width, self.dw_size) if self.width else None

    @property
    def layout(self) -> GhostLayout | None:
        """The layout of its ghost module, or None."""
        return None if self.form is None else GhostLayout(self.outputs, self.intrinsic, self.form)

    @property
    def narrow(self) -> bool:
        """Whether it keeps its form, with fewer maps."""
        return self.reads is not None and self.form is None

    @property
    def outputs(self) -> int:
        """The maps that it makes, intrinsic ones and ghosts."""
        return self.filters[0] if self.makes is None else self.makes


@dataclass(frozen=True)
class Report:
    """All convolutions in order of use, whole-model MACs where known, images used, seconds of each part, and blocks.

    `lost` names methods and attributes of the original that the result has not. Errors of lines are those of the
    closed-form fit, before any reconstruction. `notes` are those of the plan.
    """

    lines: tuple[Line, ...]
    macs_before: int | None
    macs_after: int | None
    images: int
    seconds: dict[str, float]
    reconstruction: Reconstruction | None = None
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rewritten(self) -> int:
        return sum(line.reason is None for line in self.lines)

    @property
    def effort(self) -> str:
        """How long the fit took, and on what."""
        total = sum(self.seconds.values())
        shares = ", ".join(f"{name} {spent / total:.0%}" for name, spent in self.seconds.items() if spent)
        return f"{total:.0f} s ({shares})" if total else "0 s"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings; channels as one string a line."""
        data = dataclasses.asdict(self)
        for line in data["lines"]:
            line["channels"] = " ".join(map(str, line["channels"]))
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of `to_dict`, also after JSON has made lists of tuples."""
        lines = []
        for item in data["lines"]:
            shape = {k: None if item[k] is None else tuple(item[k]) for k in ("filters", "output")}
            channels = tuple(map(int, item.get("channels", "").split()))
            lines.append(Line(**{**item, **shape, "channels": channels}))
        counts = {k: data[k] for k in ("macs_before", "macs_after", "images", "seconds")}
        done = data.get("reconstruction")
        if done is not None:
            blocks = tuple(Rebuilt(**{**item, "layers": tuple(item["layers"])}) for item in done["blocks"])
            done = Reconstruction(**{**done, "blocks": blocks})
        return cls(
            tuple(lines),
            **counts,
            reconstruction=done,
            lost=tuple(data.get("lost", ())),
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
    info = module.__dict__.get("meta", {}).get(META)
    if not isinstance(info, ConversionInfo):
        raise GhostifyError(f"{type(module).__name__} carries no report: pass what ghostify() or load() returned")
    return info


def attach(module: nn.Module, made: Report, source: dict[str, Any] | None = None) -> nn.Module:
    """The module, carrying its report and source where torch.fx keeps what copies and pickles take along."""
    module.__dict__.setdefault("meta", {})[META] = ConversionInfo(made, source)
    return module


def summarise(
    plan: Plan, fits: Fits | None = None, reconstruction: Reconstruction | None = None, lost: tuple[str, ...] = ()
) -> Report:
    """The report of a plan, with the errors of its fits, and of its blocks, where they are done."""
    lines = tuple(_line(entry, fits) for entry in plan.entries)
    images, seconds = (0, {}) if fits is None else (fits.images, fits.seconds)
    return Report(lines, plan.macs_before, plan.macs_after, images, seconds, reconstruction, lost, plan.notes)


def _line(entry: Rewrite | Narrow | Skip, fits: Fits | None) -> Line:
    conv = entry.conv
    places = cost.positions(conv.calls)
    before, bias = cost.dense_macs(conv), conv.outputs * conv.bias
    common: dict[str, Any] = {
        "name": conv.name,
        "kind": conv.kind,
        "filters": (conv.outputs, conv.inputs // conv.groups, *conv.kernel),
        "output": _size(conv),
        "macs_before": before * (places or 1),
        "params_before": before + bias,
    }
    if isinstance(entry, Skip):
        same = {"macs_after": common["macs_before"], "params_after": common["params_before"]}
        return Line(**common, **same, reason=entry.reason, intrinsic=conv.outputs, width=0, dw_size=0, gather=False)
    fitted = None if fits is None else fits.weights.get(conv.name)
    left = conv if entry.narrowing is None else left_of(conv, entry.narrowing)
    if entry.narrowing is not None:
        common |= {"makes": left.outputs, "reads": left.inputs}
    common |= {
        "reason": None,
        "macs_after": entry.macs_after * (places or 1),
        "params_after": entry.macs_after + left.outputs * conv.bias,
        "error": _mean(None if fitted is None else fitted.error),
        "held_out": _mean(None if fitted is None else fitted.held_out),
        "felt": None if fitted is None else fitted.felt,
    }
    if isinstance(entry, Narrow):
        return Line(**common, intrinsic=left.outputs, width=0, dw_size=0, gather=False)
    weights = None if fits is None else fits.ghost(conv.name)
    ordered = weights is not None and bool((weights.channels.diff() == 1).all())
    stored = entry.layout.to_dict()
    return Line(
        **common,
        intrinsic=stored["intrinsic"],
        width=stored["width"],
        dw_size=stored["dw_size"],
        gather=entry.absorb is None and not ordered,
        activated=weights is not None and weights.activated,
        channels=() if weights is None else _originals(entry, weights.channels.tolist()),
    )


def _originals(entry: Rewrite, channels: list[int]) -> tuple[int, ...]:
    """The original's channels, from their places among those that are left."""
    keeps = None if entry.narrowing is None else entry.narrowing.kept_out
    return tuple(channels) if keeps is None else tuple(keeps[k] for k in channels)


def table(made: Report, title: str = "") -> Table:
    """A table of the report for a terminal."""
    longest = max((len(line.name) for line in made.lines), default=0)
    result = Table(
        title=title or None,
        caption="\n".join(made.notes) or None,
        box=box.SIMPLE_HEAD,
        show_footer=made.macs_before is not None,
        footer_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )
    result.add_column("layer", "the whole model", overflow="fold", min_width=min(longest, 22))
    for heading in ("filters", "output"):
        result.add_column(heading, no_wrap=True)
    for heading, total in (("MACs", made.macs_before), ("after", made.macs_after)):
        result.add_column(heading, short(total), justify="right", no_wrap=True)
    fitted = any(line.error is not None for line in made.lines)
    if fitted:
        result.add_column("error", justify="right")
    result.add_column("m + ghosts, or why not", overflow="fold")
    for line in made.lines:
        result.add_row(*_cells(line, fitted))
    return result


def _cells(line: Line, fitted: bool) -> list[str]:
    filters = format_shape(line.filters)
    output = "" if line.output is None else format_shape(line.output)
    if line.reason is not None:
        return [line.name, filters, output, short(line.macs_before), "", *[""] * fitted, describe_outcome(line)]
    error = line.held_out if line.held_out is not None else line.error
    return [
        line.name,
        filters,
        output,
        short(line.macs_before),
        short(line.macs_after),
        *(["" if error is None else f"{error:.3f}"] if fitted else []),
        describe_outcome(line),
    ]


def outcome_of(line: Line) -> str:
    """What became of a convolution, as one of few kinds."""
    if line.reason is not None:
        return UNCHANGED
    match line.form:
        case None:
            return PRUNED
        case Depthwise():
            return DEPTHWISE
        case Grouped() | Pointwise():
            return WIDER
        case _:
            assert_never(line.form)


def describe_outcome(line: Line, *, counts: bool = True) -> str:
    """What became of a convolution, in a few words: why it was skipped, or what it was replaced by.

    Without `counts` the kind of outcome stands in place of the numbers of intrinsic maps and ghosts.
    """
    if line.reason is not None:
        return line.reason
    sizes = f"{line.intrinsic} + {line.outputs - line.intrinsic}, d={line.dw_size}"
    if not counts:
        shape = outcome_of(line) if line.reads is None else f"{outcome_of(line)}: {line.reads} to {line.makes}"
    elif line.reads is None:
        shape = sizes
    else:
        shape = f"{line.reads} maps to {line.makes if line.narrow else sizes}"
    return shape + _width(line) + (", activated" if line.activated else "") + (", gather" if line.gather else "")


def _width(line: Line) -> str:
    """How many intrinsic maps each ghost sees, where it is more than one."""
    match line.form:
        case None | Depthwise():
            return ""
        case Grouped() | Pointwise():
            return f", w={line.width}"
        case _:
            assert_never(line.form)


def short(count: int | None) -> str:
    """A count with three digits and a unit: 1.23 M."""
    if count is None:
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _size(conv: Convolution) -> tuple[int, int] | None:
    shape = conv.calls[0].output_shape if conv.calls else None
    return None if shape is None else (shape[-2], shape[-1])


def _mean(values: Any) -> float | None:
    return None if values is None else float(values.mean())
