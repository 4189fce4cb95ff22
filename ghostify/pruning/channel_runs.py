"""Runs of neighbouring channels, joined where they must change together: a union-find whose elements can be cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(eq=False)
class ChannelRun:
    """`size` neighbouring channels; `successors` are the run that it was joined with, or the halves that it was cut in.

    `fixed` says why its channels must stay as they are, `counted` why at least their number must, None where nothing
    says so. `residual`: several values are added into it.
    """

    size: int
    fixed: str | None = None
    counted: str | None = None
    residual: bool = False
    successors: tuple[ChannelRun, ...] = ()

    def pieces(self) -> tuple[ChannelRun, ...]:
        """The runs that it consists of now, in order."""
        if not self.successors:
            return (self,)
        return tuple(piece for run in self.successors for piece in run.pieces())

    def join(self, other: ChannelRun) -> None:
        """Make this run of the same size change together with `other`, which goes on for both."""
        other.fixed, other.counted = other.fixed or self.fixed, other.counted or self.counted
        other.residual |= self.residual
        self.successors = (other,)

    def cut(self, size: int) -> None:
        """Part the first `size` channels from the others."""
        self.successors = tuple(
            ChannelRun(part, self.fixed, self.counted, self.residual) for part in (size, self.size - size)
        )


def pieces_of(runs: Iterable[ChannelRun]) -> tuple[ChannelRun, ...]:
    """The runs that a sequence of runs consists of now, in order."""
    return tuple(piece for run in runs for piece in run.pieces())


def join_runs(left: tuple[ChannelRun, ...], right: tuple[ChannelRun, ...]) -> bool:
    """Make two sequences of equally many channels change together, cut where either is; whether they did not before."""
    changed, position = False, 0
    while position < len(own := pieces_of(left)):
        first, second = own[position], pieces_of(right)[position]
        if first.size != second.size:
            larger, smaller = (first, second) if first.size > second.size else (second, first)
            larger.cut(smaller.size)
        elif first is not second:
            second.join(first)
            changed = True
        else:
            position += 1
    return changed
