"""The form of a layer's ghosts, and how its output maps split into intrinsic maps and ghosts.

A new form of ghost is a new final dataclass here, added to `GhostForm`, with its name for `cheap` in `NAMED_FORMS` and
`make_layout`. mypy then lists every place that has to handle it: its convolutions, cost and stored numbers in this
module, its candidates, predicted error, fit and report in other modules. At run time a form that such a place does not
handle is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from typing_extensions import assert_never

from ghostify.errors import GhostifyError


@final
@dataclass(frozen=True)
class Depthwise:
    """Every ghost is one intrinsic map convolved with a d x d kernel, d = `kernel_size` (Han et al., 2020)."""

    kernel_size: int


@final
@dataclass(frozen=True)
class Grouped:
    """Every ghost is a sum of the `width` intrinsic maps of its group, each convolved with a d x d kernel."""

    width: int
    kernel_size: int


@final
@dataclass(frozen=True)
class Pointwise:
    """Every ghost is a linear combination of all intrinsic maps, pixel by pixel: a low-rank factorization."""


GhostForm = Depthwise | Grouped | Pointwise
NAMED_FORMS: Mapping[str, type[GhostForm]] = {"pointwise": Pointwise, "depthwise": Depthwise}  # as `cheap` names them


def form_of(intrinsic: int, width: int, kernel_size: int) -> GhostForm:
    """The form of ghosts that read `width` of the intrinsic maps with kernels of `kernel_size`.

    Forms that would build the same module have one name: a group of one map is depthwise, one of all maps with
    one-pixel kernels is pointwise.
    """
    if width == 1:
        return Depthwise(kernel_size)
    if width == intrinsic and kernel_size == 1:
        return Pointwise()
    return Grouped(width, kernel_size)


def may_read_activated(form: GhostForm) -> bool:
    """Whether ghosts of this form may read the intrinsic maps after norm and activation."""
    match form:
        case Depthwise():
            return True
        case Grouped() | Pointwise():
            return False
        case _:
            assert_never(form)


@dataclass(frozen=True)
class CheapConvSpec:
    """A convolution in `groups` groups that computes `outputs` ghosts from the intrinsic maps `start` to `stop`."""

    start: int
    stop: int
    groups: int
    outputs: int
    kernel_size: int


@dataclass(frozen=True)
class GhostLayout:
    """How `outputs` maps split into `intrinsic` ones and ghosts, and the form of the ghosts.

    Intrinsic maps and ghosts are numbered in the order in which the module computes them. Raises `GhostifyError` for
    counts that build no module, and for a form that `form_of` gives another name.
    """

    outputs: int
    intrinsic: int
    form: GhostForm

    def __post_init__(self) -> None:
        if not 1 <= self.intrinsic < self.outputs:
            raise GhostifyError(f"{self}: has no intrinsic maps or no ghosts. Choose 1 <= intrinsic < outputs.")
        width, d, _ = self.kernel_shape
        if width < 1 or d < 1 or d % 2 == 0:
            raise GhostifyError(f"{self}: is not a convolution. Choose a width of at least 1 and an odd kernel size.")
        simplest = form_of(self.intrinsic, width, d)
        if simplest != self.form:
            raise GhostifyError(f"{self}: its ghosts have a simpler form. Use {simplest}.")
        if round_up_width(self.outputs, self.intrinsic, width) != width:
            raise GhostifyError(f"{self}: groups do not divide the maps evenly. Use the width of `round_up_width`.")

    @classmethod
    def of_width(cls, outputs: int, intrinsic: int, width: int, kernel_size: int) -> GhostLayout:
        """The layout whose ghosts read `width` intrinsic maps each, from the four numbers that are stored."""
        return cls(outputs, intrinsic, form_of(intrinsic, width, kernel_size))

    @property
    def ghosts(self) -> int:
        """The number of ghosts."""
        return self.outputs - self.intrinsic

    @property
    def kernel_shape(self) -> tuple[int, int, int]:
        """Shape of one ghost's filter: the number of intrinsic maps that it reads, kernel height and kernel width."""
        match self.form:
            case Depthwise(d):
                return 1, d, d
            case Grouped(width, d):
                return width, d, d
            case Pointwise():
                return self.intrinsic, 1, 1
            case _:
                assert_never(self.form)

    @property
    def kernel_size(self) -> int:
        """Height and width of every kernel."""
        return self.kernel_shape[1]

    @property
    def macs_per_position(self) -> int:
        """Multiply-accumulates of the cheap operation for one output position, which is also its number of weights."""
        return self.ghosts * math.prod(self.kernel_shape)

    @property
    def conv_specs(self) -> tuple[CheapConvSpec, ...]:
        """The convolutions of the cheap operation: one, or two depthwise ones where ghosts do not divide evenly."""
        m, ghosts = self.intrinsic, self.ghosts
        match self.form:
            case Depthwise(d):
                per_map, rest = divmod(ghosts, m)
                first = CheapConvSpec(0, rest, rest, rest * (per_map + 1), d)
                second = CheapConvSpec(rest, m, m - rest, (m - rest) * per_map, d)
                return tuple(spec for spec in (first, second) if spec.outputs)
            case Grouped(width, d):
                return (CheapConvSpec(0, m, m // width, ghosts, d),)
            case Pointwise():
                return (CheapConvSpec(0, m, 1, ghosts, 1),)
            case _:
                assert_never(self.form)

    @property
    def capacities(self) -> tuple[int, ...]:
        """The number of ghosts of each group of intrinsic maps, in order; 0 for maps without ghosts."""
        per_group = [spec.outputs // spec.groups for spec in self.conv_specs for _ in range(spec.groups)]
        return (*per_group, *[0] * (self.intrinsic - self.conv_specs[-1].stop))

    @property
    def is_low_rank(self) -> bool:
        """Whether every map is a pixelwise combination of all intrinsic ones: the error is then that of a low-rank
        factorization, and one dense 1 x 1 convolution can replace cheap operation and concatenation."""
        match self.form:
            case Pointwise():
                return True
            case Depthwise(d):
                return d == self.intrinsic == 1
            case Grouped():
                return False
            case _:
                assert_never(self.form)

    def to_dict(self) -> dict[str, int]:
        """The numbers that are stored of a layout; `of_width` builds it from them.

        A form that these numbers do not identify needs one more, here and in `of_width` and `LayerReport`.
        """
        match self.form:
            case Depthwise() | Grouped() | Pointwise():
                width, d, _ = self.kernel_shape
            case _:
                assert_never(self.form)
        return {"outputs": self.outputs, "intrinsic": self.intrinsic, "width": width, "dw_size": d}


def intrinsic_count(outputs: int, ratio: float) -> int:
    """m = ceil(n / ratio) (Han et al., 2020, section 3.1), unaffected by the rounding of n / ratio."""
    return math.ceil(outputs / ratio - 1e-9)


def round_up_width(outputs: int, intrinsic: int, width: int) -> int:
    """The smallest width >= `width` whose groups divide intrinsic maps and ghosts evenly; 1 always does."""
    if width <= 1:
        return 1
    divisors = (g for g in range(max(1, intrinsic // width), 0, -1) if intrinsic % g == (outputs - intrinsic) % g == 0)
    return intrinsic // next(divisors)


def make_layout(outputs: int, intrinsic: int, cheap: str | int, dw_size: int) -> GhostLayout:
    """The layout of `intrinsic` of `outputs` maps with the form of ghosts that a rule's `cheap` names; not "auto".

    Raises `GhostifyError` for other values.
    """
    form: GhostForm
    match cheap:
        case "depthwise":
            form = Depthwise(dw_size)
        case "pointwise":
            form = form_of(intrinsic, intrinsic, 1)
        case int():
            form = form_of(intrinsic, round_up_width(outputs, intrinsic, min(cheap, intrinsic)), dw_size)
        case _:
            raise GhostifyError(f"cheap {cheap!r}: is not one form of ghost. Use 'depthwise', 'pointwise' or a width.")
    return GhostLayout(outputs, intrinsic, form)
