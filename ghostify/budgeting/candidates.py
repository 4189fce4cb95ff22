"""What may become of each convolution, and of each link: layouts and maps with their costs, and the error they add."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ghostify.budgeting.measure import layer_milliseconds, line_milliseconds
from ghostify.budgeting.profile import Profile
from ghostify.budgeting.stopwatch import Stopwatch
from ghostify.budgeting.thinning import Thinning
from ghostify.fitting.assign import choose_groups
from ghostify.fitting.systems import root_of
from ghostify.ghost import Layout, intrinsic_maps
from ghostify.planning import cost
from ghostify.planning.links import Link
from ghostify.planning.plan import Target
from ghostify.tracing.program import Convolution, Program

RATIOS = (1.25, 1.5, 2, 2.5, 3, 4, 6, 8)
STEPS = 32
THIN = 32
LANES = 16
FASTER = 0.97


@dataclass(frozen=True)
class Candidate:
    """One way to treat a convolution, or the convolutions of a link: its layout, or the maps kept (None: as it is), its
    costs - of a link, beyond those of its convolutions as they are -, and the output error it would add."""

    layout: Layout | None
    costs: tuple[float, ...]
    loss: float
    kept: tuple[int, ...] | None = None


def candidates_of(
    program: Program, target: Target, profile: Profile, keys: tuple[str, ...], clock: Stopwatch
) -> list[Candidate]:
    """As it is, first, and every layout of the rule's form that saves multiply-accumulates and is worth its cost.

    What a layout costs is known before the error that it would add, which takes long to find for many maps: whatever
    is beaten at the least error that it could have is not looked at.
    """
    conv, timed, losses = target.conv, "latency" in keys, _Losses(profile, target.rule.dw_size)
    layouts = [own for own in _layouts(target, profile, timed) if cost.ghost_macs(conv, own) < cost.dense_macs(conv)]
    whole, *costs = zip(*(_spent(program, conv, [None, *layouts], key, clock) for key in keys), strict=True)
    found = [Candidate(None, whole, 0.0)]
    for layout, spent in zip(layouts, costs, strict=True):
        if timed and spent[keys.index("latency")] >= FASTER * whole[keys.index("latency")]:
            continue
        hoped = Candidate(layout, spent, losses.least(layout))
        if not any(_dominates(other, hoped) for other in found):
            found.append(Candidate(layout, spent, losses.of(layout)))
    return [found[0], *(c for c in found[1:] if not any(_dominates(other, c) for other in found))]


def thinned(program: Program, thinning: Thinning, keys: tuple[str, ...], clock: Stopwatch) -> Iterator[Candidate]:
    """As it is, first, and fewer and fewer maps of a link; where they are to be timed, those that become faster."""
    link = thinning.link
    yield Candidate(None, (0.0,) * len(keys), 0.0)
    counts = {max(1, round(link.maps * k / THIN)) for k in range(1, THIN)}
    if "latency" in keys:
        counts = {max(LANES, LANES * round(count / LANES)) for count in counts}
    ways = [thinning.kept(count) for count in sorted(counts) if count < link.maps]
    convs = [program.conv(member.conv.name) for member in link.line]
    spent = {key: _line_costs(link, convs, ways, key, clock) for key in keys}
    for k, kept in enumerate(ways):
        more = tuple(spent[key][k] for key in keys)
        if "latency" not in keys or more[keys.index("latency")] < 0:
            yield Candidate(None, more, thinning.loss(len(kept)), kept)


def _spent(
    program: Program, conv: Convolution, layouts: list[Layout | None], key: str, clock: Stopwatch
) -> list[float]:
    """What each layout of a layer costs; each weight is used once a position."""
    if key == "latency":
        return layer_milliseconds(program.conv(conv.name), conv, layouts, clock)
    weights = [cost.dense_macs(conv) if own is None else cost.ghost_macs(conv, own) for own in layouts]
    if key == "macs":
        return [float(w * (cost.positions(conv.calls) or 0)) for w in weights]
    return [float(w + conv.outputs * conv.bias) for w in weights]


def _line_costs(
    link: Link, convs: list[nn.Conv2d], ways: list[tuple[int, ...]], key: str, clock: Stopwatch
) -> list[float]:
    """What the convolutions of a link cost with fewer maps, beyond what they cost as they are."""
    if key == "latency":
        whole, *fewer = line_milliseconds(convs, link.producer, [None, *ways], clock)
        return [own - whole if own < FASTER * whole else 0.0 for own in fewer]

    def cost_of(kept: tuple[int, ...] | None) -> float:
        total = 0.0
        for member in link.members:
            conv = member.conv
            keeps, reads = kept if member.makes else None, kept if member.reads else None
            weights = cost.narrow_macs(conv, keeps, reads)
            biases = conv.bias * (conv.outputs if keeps is None else len(keeps))
            total += weights * (cost.positions(conv.calls) or 0) if key == "macs" else weights + biases
        return total

    return [cost_of(kept) - cost_of(None) for kept in ways]


def _dominates(a: Candidate, b: Candidate) -> bool:
    better = a.loss <= b.loss and all(x <= y for x, y in zip(a.costs, b.costs, strict=True))
    return better and (a.loss, a.costs) != (b.loss, b.costs)


def _layouts(target: Target, profile: Profile, timed: bool) -> Iterator[Layout]:
    """Pointwise ones, then depthwise ones; where they are to be timed, fewer, that fill vector registers."""
    n, cheap = target.conv.outputs, target.rule.cheap
    if cheap in ("auto", "pointwise"):
        sizes = {max(1, round(n * k / STEPS)) for k in range(1, STEPS)}
        if timed:
            sizes = {max(LANES, LANES * round(m / LANES)) for m in sizes}
        yield from (Layout(n, m, m, 1) for m in sorted(sizes) if m < n)
    if profile.maps is not None:
        for m in sorted({intrinsic_maps(n, ratio) for ratio in RATIOS} - {n}):
            yield Layout(n, m, 1, target.rule.dw_size)


class _Losses:
    """The error of the model's outputs that layouts of one convolution would add."""

    def __init__(self, profile: Profile, dw_size: int) -> None:
        self.profile, self.dw_size = profile, dw_size

    def of(self, layout: Layout) -> float:
        """That of the best directions for a pointwise layout, of the chosen pairs for a depthwise one."""
        if self._is_depthwise(layout):
            return choose_groups(self._pairs, layout).total(self._pairs)
        return float(self._tails[layout.ghosts])

    def least(self, layout: Layout) -> float:
        """No more than that: as if every ghost could choose its map, and the ghosts were those who lose least so."""
        if not self._is_depthwise(layout):
            return self.of(layout)
        return float(self._cheapest[: layout.ghosts].sum())

    def _is_depthwise(self, layout: Layout) -> bool:
        return layout.width == 1 and layout.dw_size == self.dw_size and self.profile.maps is not None

    @cached_property
    def _tails(self) -> Tensor:
        return _tails(self.profile)

    @cached_property
    def _pairs(self) -> Tensor:
        assert self.profile.maps is not None
        return self.profile.maps.costs(self.profile.metric.diagonal())

    @cached_property
    def _cheapest(self) -> Tensor:
        others = self._pairs.clone().fill_diagonal_(float("inf"))
        return others.amin(0).sort().values


def _tails(profile: Profile) -> Tensor:
    """Weighted error of the best n - k directions for the outputs, for k = 0 ... n left out: the sum of the k smallest
    eigenvalues. Directions of one half of the images are judged on the other: few images look simpler than they are."""
    root = root_of(profile.metric)
    halves = [root.T @ c @ root for c in profile.covariances]
    lost = torch.zeros(len(root), dtype=root.dtype)
    for own, other in zip(halves, reversed(halves), strict=True):
        vectors = torch.linalg.eigh(own).eigenvectors
        lost += ((vectors.T @ other) * vectors.T).sum(1).clamp_min(0) / len(halves)
    return torch.cat((torch.zeros(1, dtype=lost.dtype), lost.cumsum(0)))
