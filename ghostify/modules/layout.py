"""The form of a layer's ghosts, and how its output maps split into intrinsic maps and ghosts.

A new form of ghost is a new dataclass here, added to `GhostForm`. mypy then lists every `match` that has to handle it:
its convolutions, cost and stored form in this module; its predicted loss, its fit and its deployment where these are
decided. At run time a form that a `match` does not know is an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from typing_extensions import assert_never

from ghostify.errors import GhostifyError


@dataclass(frozen=True)
class Depthwise:
    """Every ghost is one intrinsic map convolved with a d x d kernel, d = `kernel_size` (Han et al., 2020)."""

    kernel_size: int


@dataclass(frozen=True)
class Grouped:
    """Every ghost is a sum of the `width` intrinsic maps of its group, each convolved with a d x d kernel."""

    width: int
    kernel_size: int


@dataclass(frozen=True)
class Pointwise:
    """Every ghost is a linear combination of all intrinsic maps, pixel by pixel: a low-rank factorisation."""


GhostForm = Depthwise | Grouped | Pointwise


def form_of(intrinsic: int, width: int, kernel_size: int) -> GhostForm:
    """The one form of ghosts that see `width` of the intrinsic maps through kernels of `kernel_size`.

    Forms that would build the same module have one name: a group of one map is depthwise, one of all maps with
    one-pixel kernels is pointwise.
    """
    if width == 1:
        return Depthwise(kernel_size)
    if width == intrinsic and kernel_size == 1:
        return Pointwise()
    return Grouped(width, kernel_size)


def may_read_activated(form: GhostForm) -> bool:
    """Whether ghosts of this form may read the intrinsic maps behind norm and activation."""
    match form:
        case Depthwise():
            return True
        case Grouped() | Pointwise():
            return False
        case _:
            assert_never(form)


@dataclass(frozen=True)
class CheapConvSpec:
    """A grouped convolution that makes `outputs` ghosts from the intrinsic maps `start` to `stop`."""

    start: int
    stop: int
    groups: int
    outputs: int
    kernel_size: int


@dataclass(frozen=True)
class GhostLayout:
    """How `outputs` maps split into `intrinsic` ones and ghosts, and the form of the ghosts.

    Intrinsic maps and ghosts are numbered in the order in which the module computes them. Raises `GhostifyError` for
    numbers that build no module, and for a form that `form_of` gives another name.
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
        named = form_of(self.intrinsic, width, d)
        if named != self.form:
            raise GhostifyError(f"{self}: its ghosts have a simpler form. Use {named}.")
        if round_up_width(self.outputs, self.intrinsic, width) != width:
            raise GhostifyError(f"{self}: groups do not divide the maps evenly. Take the width of `round_up_width`.")

    @classmethod
    def of_width(cls, outputs: int, intrinsic: int, width: int, kernel_size: int) -> GhostLayout:
        """The layout whose ghosts see `width` intrinsic maps each: what reports on disk say."""
        return cls(outputs, intrinsic, form_of(intrinsic, width, kernel_size))

    @property
    def ghosts(self) -> int:
        """The number of ghosts."""
        return self.outputs - self.intrinsic

    @property
    def kernel_shape(self) -> tuple[int, int, int]:
        """Of one ghost: how many intrinsic maps it sees, and height and width of its kernel on each of them."""
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
        """Multiply-accumulates of the cheap operation for one output position, and its weights."""
        return self.ghosts * math.prod(self.kernel_shape)

    @property
    def conv_specs(self) -> tuple[CheapConvSpec, ...]:
        """The convolutions of the cheap operation; depthwise ones are two where the ghosts do not divide evenly."""
        m, ghosts = self.intrinsic, self.ghosts
        match self.form:
            case Depthwise(d):
                each, more = divmod(ghosts, m)
                first = CheapConvSpec(0, more, more, more * (each + 1), d)
                second = CheapConvSpec(more, m, m - more, (m - more) * each, d)
                return tuple(spec for spec in (first, second) if spec.outputs)
            case Grouped(width, d):
                return (CheapConvSpec(0, m, m // width, ghosts, d),)
            case Pointwise():
                return (CheapConvSpec(0, m, 1, ghosts, 1),)
            case _:
                assert_never(self.form)

    @property
    def capacities(self) -> tuple[int, ...]:
        """Ghosts of each group of intrinsic maps that go together; 0 for maps without ghosts."""
        served = [spec.outputs // spec.groups for spec in self.conv_specs for _ in range(spec.groups)]
        return (*served, *[0] * (self.intrinsic - self.conv_specs[-1].stop))

    @property
    def is_low_rank(self) -> bool:
        """Whether all maps are combinations of all intrinsic ones, pixel by pixel: the error is then that of low rank,
        and one dense 1 x 1 convolution may stand for the cheap operation and the concatenation."""
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
        """What is stored of a layout: plain numbers, which tell every layout from every other."""
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
    """The least width >= `width` whose groups divide intrinsic maps and ghosts evenly; 1 always does."""
    if width <= 1:
        return 1
    divisors = (g for g in range(max(1, intrinsic // width), 0, -1) if intrinsic % g == (outputs - intrinsic) % g == 0)
    return intrinsic // next(divisors)
