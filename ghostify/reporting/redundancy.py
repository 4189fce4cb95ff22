"""How redundant a layer's maps are: each made of each other by one small kernel, and half of them of the other half."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from ghostify.errors import GhostifyError
from ghostify.fitting import patches
from ghostify.fitting.depthwise_statistics import map_statistics
from ghostify.fitting.driver import fit
from ghostify.fitting.moments import PerMapMoments
from ghostify.graph.program import Program
from ghostify.planning.planner import plan
from ghostify.planning.policy import Policy, Rule
from ghostify.reporting import images
from ghostify.reporting.feature_maps import errors_of, ghost_outputs, layer_outputs
from ghostify.reporting.images import grey_tile
from ghostify.rewriting.apply import rewrite

SIZES = (1, 3, 5, 7)
SHOWN = 3
PICTURES = 8


@dataclass(frozen=True, eq=False)
class PairErrors:
    """Errors (n x n) of map j made of map i by the best d x d kernel and a constant; a map of itself counts infinite.

    `squared` is the mean squared error, as in GhostNet's table 1 (Han et al., 2020, section 4.1.1), `relative` the same
    by the map's own variance: a map that is nearly constant has a small error whatever it is made of.
    """

    dw_size: int
    squared: Tensor
    relative: Tensor

    def best(self, count: int) -> list[tuple[int, int]]:
        """The `count` pairs (source, made of it) of the least relative error that share no map."""
        left, found = self.relative.clone(), list[tuple[int, int]]()
        while len(found) < min(count, len(left) // 2):
            i, j = divmod(int(left.argmin()), len(left))
            found.append((i, j))
            left[[i, j]] = left[:, [i, j]] = float("inf")
        return found


@dataclass(frozen=True, eq=False)
class RedundancyStudy:
    """A layer's maps on one image (n x H x W), by kernel size how they make each other, and for the layer at ratio 2:
    the intrinsic channels, and the maps as its ghost module makes them with each map's relative error."""

    layer: str
    maps: Tensor
    pairs: tuple[PairErrors, ...]
    intrinsic: tuple[int, ...]
    ghosted: Tensor
    errors: Tensor

    @property
    def shown(self) -> PairErrors:
        """The pairs that tables and pictures pick the best of: those of the second kernel size, if there is one."""
        return self.pairs[min(1, len(self.pairs) - 1)]

    @property
    def ghosts(self) -> list[int]:
        """The channels that are not intrinsic."""
        return [k for k in range(len(self.maps)) if k not in self.intrinsic]

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the maps: the best pairs by the size shown, every map's best error, and the ghosts'."""
        named = [
            {
                "pair": list(pair),
                **{f"mse d={p.dw_size}": float(p.squared[pair]) for p in self.pairs},
                **{f"relative d={p.dw_size}": float(p.relative[pair]) for p in self.pairs},
            }
            for pair in self.shown.best(SHOWN)
        ]
        best = {p.dw_size: p.relative.min(0).values for p in self.pairs}
        return {
            "layer": self.layer,
            "maps": len(self.maps),
            "pairs": named,
            "best relative, median": {d: float(own.median()) for d, own in best.items()},
            "best relative below 0.1": {d: int((own < 0.1).sum()) for d, own in best.items()},
            "ghosts": self.ghosts,
            "ghosts relative, median": float(self.errors[self.ghosts].median()),
        }


def study_layer(
    program: Program, layer: str, images: Iterable[Any], *, sizes: Sequence[int] = SIZES, seed: int = 0
) -> RedundancyStudy:
    """Look at the outputs of one convolution on `images`: how its maps make each other, and a ghost module of them.

    Raises `GhostifyError` for a layer that the program has not, or that cannot be rewritten.
    """
    batches = list(images)
    if not batches:
        raise GhostifyError("a study needs images: pass a few, such as a batch")
    if layer not in dict(program.module.named_modules()):
        names = ", ".join(c.name for c in program.convolutions[:5])
        raise GhostifyError(f"{layer}: is no convolution of the model: it has {names}, ...")
    decided = plan(program, Policy((Rule(targets=(layer,)),), keep_first=False))
    if not decided.rewrites:
        reason = next(s.reason for s in decided.skips if s.conv.name == layer)
        raise GhostifyError(f"{layer}: {reason}")
    fits = fit(program, decided, batches, seed=seed)
    channels = fits.ghost(layer).channels.tolist()
    maps = layer_outputs(program.module, layer, batches)
    ghosted = ghost_outputs(rewrite(program, decided, fits.weights), layer, batches, channels)
    intrinsic = channels[: decided.rewrites[0].layout.intrinsic]
    return RedundancyStudy(
        layer,
        maps[0],
        tuple(pairs_of(maps, d) for d in sizes),
        tuple(sorted(intrinsic)),
        ghosted[0],
        errors_of(ghosted, maps),
    )


def pairs_of(maps: Tensor, dw_size: int) -> PairErrors:
    """All pairs of `maps` (N x n x H x W) by kernels of one size, zeros beyond the border."""
    n = maps.shape[1]
    moments = PerMapMoments.zero(n, dw_size**2)
    for own in maps.split(1):
        padded = F.pad(own, (dw_size // 2,) * 4)
        moments.add(patches.unfold_neighbours(padded, dw_size), patches.flatten_positions(own))
    found = replace(map_statistics(moments), rows=float("inf"))  # to describe what is there, not to foretell
    squared = found.pair_errors(torch.ones(n, dtype=torch.float64))
    squared.fill_diagonal_(float("inf"))
    return PairErrors(dw_size, squared, squared / found.var.clamp_min(1e-12 * found.var.max() + 1e-30))


def table(found: RedundancyStudy) -> Table:
    """The pairs of GhostNet's table 1, for a terminal."""
    facts = found.to_dict()
    sizes = [p.dw_size for p in found.pairs]
    result = Table(title=f"{found.layer}: {facts['maps']} maps", box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("map made of map, MSE (relative error)")
    for d in sizes:
        result.add_column(f"d={d}", justify="right")
    for row in facts["pairs"]:
        cells = [f"{row[f'mse d={d}']:.2g} ({row[f'relative d={d}']:.3f})" for d in sizes]
        result.add_row(f"{row['pair'][1]} of {row['pair'][0]}", *cells)
    result.add_row("every map of its best, median", *(f"{facts['best relative, median'][d]:.3f}" for d in sizes))
    result.add_row("maps with an error below 0.1", *(str(facts["best relative below 0.1"][d]) for d in sizes))
    return result


def write_pictures(found: RedundancyStudy, folder: Path) -> list[Path]:
    """Write pairs.png (a row each: source, what a kernel makes of it, map) and ghosts.png (originals above ghosts)."""
    folder.mkdir(parents=True, exist_ok=True)
    size = found.shown.dw_size
    rows = [tile for i, j in found.shown.best(SHOWN) for tile in _pair_tiles(found.maps, i, j, size)]
    ghosts = found.ghosts[:PICTURES]
    own = [grey_tile(maps[k], found.maps[k]) for maps in (found.maps, found.ghosted) for k in ghosts]
    return [images.write(rows, 3, folder / "pairs.png"), images.write(own, len(ghosts), folder / "ghosts.png")]


def _pair_tiles(maps: Tensor, source: int, target: int, dw_size: int) -> list[Tensor]:
    """A map, what the best kernel makes of another one, and that one."""
    padded = F.pad(maps[None, source : source + 1], (dw_size // 2,) * 4)
    rows = patches.unfold_neighbours(padded, dw_size).flatten(1).double()
    wanted = maps[target].flatten()[:, None].double()
    given = torch.cat((rows, torch.ones_like(wanted)), 1)
    made = (given @ torch.linalg.lstsq(given, wanted).solution).reshape(maps[target].shape).float()
    return [grey_tile(maps[source], maps[source]), grey_tile(made, maps[target]), grey_tile(maps[target], maps[target])]
