"""Colours and shapes of the methods of compare.py in figures."""

from __future__ import annotations

FAMILIES = {
    "ghostify": "#0b6e99",
    "unfitted ghosts": "#7fb7d1",
    "channel pruning": "#b45309",
    "factored filters": "#6b7280",
}
SHAPES = ("circle", "square", "triangle-up", "diamond")


def family(method: str) -> str:
    """Which of `FAMILIES` a method belongs to, by its label in the catalogue."""
    if method.startswith(("ghostify", "unfitted ghosts")):
        return method.split(",")[0]
    return "channel pruning" if method.startswith(("Torch-Pruning", "channel pruning")) else "factored filters"


def shape(method: str, methods: list[str]) -> str:
    """A shape that no other of `methods` of the same family has."""
    return SHAPES[[m for m in methods if family(m) == family(method)].index(method)]
