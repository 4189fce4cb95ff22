"""Runs of consecutive channels, joined where they must change together: a union-find whose elements can be split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(eq=False)
class ChannelRun:
    """`size` consecutive channels; `successors` are the run that it was joined with, or the two that it was split into.

    `order_obstacle` is the reason why the channels must stay as they are, `count_obstacle` why their number must, None
    where nothing prevents a change. `residual`: the run is the sum of several values.
    """

    size: int
    order_obstacle: str | None = None
    count_obstacle: str | None = None
    residual: bool = False
    successors: tuple[ChannelRun, ...] = ()

    def pieces(self) -> tuple[ChannelRun, ...]:
        """The runs that it consists of after joins and splits, in order."""
        if not self.successors:
            return (self,)
        return tuple(piece for run in self.successors for piece in run.pieces())

    def join(self, other: ChannelRun) -> None:
        """Make `other`, of the same size, the successor of this run, with the obstacles of both."""
        other.order_obstacle = other.order_obstacle or self.order_obstacle
        other.count_obstacle = other.count_obstacle or self.count_obstacle
        other.residual |= self.residual
        self.successors = (other,)

    def split(self, size: int) -> None:
        """Split the run into its first `size` channels and the others."""
        self.successors = tuple(
            ChannelRun(count, self.order_obstacle, self.count_obstacle, self.residual)
            for count in (size, self.size - size)
        )


def pieces_of(runs: Iterable[ChannelRun]) -> tuple[ChannelRun, ...]:
    """The runs that a sequence of runs consists of after joins and splits, in order."""
    return tuple(piece for run in runs for piece in run.pieces())


def join_runs(left: tuple[ChannelRun, ...], right: tuple[ChannelRun, ...]) -> bool:
    """Make two sequences with equally many channels change together, split at the boundaries of both.

    Returns whether any channels were not joined before.
    """
    changed, position = False, 0
    while position < len(pieces := pieces_of(left)):
        first, second = pieces[position], pieces_of(right)[position]
        if first.size != second.size:
            larger, smaller = (first, second) if first.size > second.size else (second, first)
            larger.split(smaller.size)
        elif first is not second:
            second.join(first)
            changed = True
        else:
            position += 1
    return changed
