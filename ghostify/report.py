"""What was done to a model, layer by layer: data, tables, JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from torch import nn

from ghostify.errors import GhostifyError
from ghostify.fitting.fit import Fits
from ghostify.planning import cost
from ghostify.planning.plan import Narrow, Plan, Rewrite, Skip
from ghostify.pruning.pruning_groups import left_of
from ghostify.reconstructing.reconstruct import Rebuilt, Reconstruction
from ghostify.tracing.program import Convolution

META = "ghostify"


@dataclass(frozen=True)
class Line:
    """One convolution. MACs are for the example inputs where `output` (H, W) is known, else for one position.

    `error` and `held_out` are relative reconstruction errors, averaged over channels, on the calibration images and on
    those of them held out; `felt` is the relative squared error of the model's outputs to expect from the latter.
    `channels` names the original's channels in the order that the ghost module makes them, intrinsic ones first.
    `gather` says that the layer's output is put in order by an index, `activated` that its ghosts read activated maps.
    Where maps are left out, `makes` counts the outputs and `reads` the inputs that are left. A convolution that keeps
    its form with fewer maps has as many intrinsic ones as it makes, and a `width` of 0.
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
    def narrow(self) -> bool:
        """Whether it keeps its form, with fewer maps."""
        return self.reads is not None and not self.width

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


def report(module: nn.Module) -> Report:
    """The report of a model that `ghostify` made or `load` read; raises `GhostifyError` for any other."""
    found = notes_of(module).get(META)
    if not isinstance(found, Report):
        raise GhostifyError(f"{type(module).__name__} carries no report: pass what ghostify() or load() returned")
    return found


def attach(module: nn.Module, made: Report) -> nn.Module:
    """The module, carrying its report."""
    note(module, META, made)
    return module


def notes_of(module: nn.Module) -> dict[str, Any]:
    """What is kept with a module but is no part of it: a traced one's `meta`, and the same for others."""
    notes: dict[str, Any] = module.__dict__.get("meta", {})
    return notes


def note(module: nn.Module, key: str, value: Any) -> None:
    """Keep something with a module."""
    module.__dict__.setdefault("meta", {})[key] = value


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
    return Line(
        **common,
        intrinsic=entry.layout.intrinsic,
        width=entry.layout.width,
        dw_size=entry.layout.dw_size,
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
    filters = "x".join(map(str, line.filters))
    output = "" if line.output is None else "x".join(map(str, line.output))
    if line.reason is not None:
        return [line.name, filters, output, short(line.macs_before), "", *[""] * fitted, what(line)]
    error = line.held_out if line.held_out is not None else line.error
    return [
        line.name,
        filters,
        output,
        short(line.macs_before),
        short(line.macs_after),
        *(["" if error is None else f"{error:.3f}"] if fitted else []),
        what(line),
    ]


def what(line: Line) -> str:
    """What became of a convolution, in a few words."""
    if line.reason is not None:
        return line.reason
    if line.narrow:
        return f"{line.reads} maps to {line.makes}"
    shape = f"{line.intrinsic} + {line.outputs - line.intrinsic}, d={line.dw_size}"
    if line.reads is not None:
        shape = f"{line.reads} maps to {shape}"
    wide = f", w={line.width}" if line.width > 1 else ""
    return shape + wide + (", activated" if line.activated else "") + (", gather" if line.gather else "")


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
