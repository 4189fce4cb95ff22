"""The redundancy of a layer's maps: errors of predicting one from another, and one half from the other half."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

from ghostify.errors import GhostifyError
from ghostify.fitting import patches
from ghostify.fitting.depthwise_statistics import map_statistics
from ghostify.fitting.driver import fit
from ghostify.fitting.moments import PerMapMoments
from ghostify.graph.program import Program
from ghostify.io.atomic import staged_folder
from ghostify.planning.planner import plan
from ghostify.planning.policy import Policy, Rule
from ghostify.reporting.feature_maps import ghost_outputs, layer_outputs, map_errors
from ghostify.reporting.images import grey_tile, write_grid
from ghostify.rewriting.apply import rewrite
from ghostify.text import printable

KERNEL_SIZES = (1, 3, 5, 7)
PAIRS_SHOWN = 3
GHOSTS_SHOWN = 8
SMALL_ERROR = 0.1
MIN_VARIANCE_SHARE, MIN_VARIANCE = 1e-12, 1e-30


@dataclass(frozen=True, eq=False)
class PairErrors:
    """Errors (n x n) of predicting map j (column) from map i (row) by the best d x d kernel and a constant.

    `squared` is the mean squared error, as in GhostNet's table 1 (Han et al., 2020, section 4.1.1). `relative` is that
    error by the variance of map j: a nearly constant map has a small squared error from any other map. The diagonals
    are infinite.
    """

    dw_size: int
    squared: Tensor
    relative: Tensor

    def best(self, count: int) -> list[tuple[int, int]]:
        """The at most `count` pairs (source, target) with the smallest relative errors, no map in two of them."""
        remaining, pairs = self.relative.clone(), list[tuple[int, int]]()
        while len(pairs) < min(count, len(remaining) // 2):
            i, j = divmod(int(remaining.argmin()), len(remaining))
            pairs.append((i, j))
            remaining[[i, j]] = remaining[:, [i, j]] = float("inf")
        return pairs


@dataclass(frozen=True, eq=False)
class RedundancyStudy:
    """The maps of a layer on one image (n x H x W), the errors of their pairs by kernel size, and its ghosts' errors.

    `intrinsic` are the channels that stay intrinsic at ratio 2, `ghost_maps` (n x H x W) the output of the ghost module
    on the same image, `errors` (n) its relative error of each map over all images.
    """

    layer: str
    maps: Tensor
    pairs: tuple[PairErrors, ...]
    intrinsic: tuple[int, ...]
    ghost_maps: Tensor
    errors: Tensor

    @property
    def ranking_pairs(self) -> PairErrors:
        """The errors that the best pairs are chosen by: those of the second kernel size, if there is one."""
        return self.pairs[min(1, len(self.pairs) - 1)]

    @property
    def ghosts(self) -> list[int]:
        """The channels that are not intrinsic."""
        return [k for k in range(len(self.maps)) if k not in self.intrinsic]

    def to_dict(self) -> dict[str, Any]:
        """The figures without the maps, as plain data; keys of the inner dicts are kernel sizes."""
        best_errors = {p.dw_size: p.relative.min(0).values for p in self.pairs}
        return {
            "layer": self.layer,
            "maps": len(self.maps),
            "pairs": [
                {
                    "source": source,
                    "target": target,
                    "mse": {p.dw_size: float(p.squared[source, target]) for p in self.pairs},
                    "relative_error": {p.dw_size: float(p.relative[source, target]) for p in self.pairs},
                }
                for source, target in self.ranking_pairs.best(PAIRS_SHOWN)
            ],
            "best_error_median": {d: float(errors.median()) for d, errors in best_errors.items()},
            "maps_with_small_error": {d: int((errors < SMALL_ERROR).sum()) for d, errors in best_errors.items()},
            "ghosts": self.ghosts,
            "ghost_error_median": float(self.errors[self.ghosts].median()),
        }


def study_layer(
    program: Program, layer: str, images: Iterable[Any], *, sizes: Sequence[int] = KERNEL_SIZES, seed: int = 0
) -> RedundancyStudy:
    """The redundancy of one convolution's maps on `images`: errors of all pairs, and of a ghost module at ratio 2.

    Raises `GhostifyError` without images, for a layer that is not in the program, or that cannot be rewritten.
    """
    batches = list(images)
    if not batches:
        raise GhostifyError("images: are empty. Pass a few, such as a batch.")
    if layer not in dict(program.module.named_modules()):
        names = ", ".join(c.name for c in program.convolutions[:5])
        raise GhostifyError(
            f"{layer}: is not a convolution of the model. Choose from {names}, ... (`ghostify plan` lists all)."
        )
    layer_plan = plan(program, Policy((Rule(targets=(layer,)),), keep_first=False))
    if not layer_plan.rewrites:
        reason = next(s.reason for s in layer_plan.skips if s.conv.name == layer)
        raise GhostifyError(f"{layer}: cannot be studied ({reason}). Choose another layer.")
    fits = fit(program, layer_plan, batches, seed=seed)
    channels = fits.ghost(layer).channels.tolist()
    maps = layer_outputs(program.module, layer, batches)
    ghost_maps = ghost_outputs(rewrite(program, layer_plan, fits.weights), layer, batches, channels)
    intrinsic = channels[: layer_plan.rewrites[0].layout.intrinsic]
    return RedundancyStudy(
        layer,
        maps[0],
        tuple(pair_errors(maps, d) for d in sizes),
        tuple(sorted(intrinsic)),
        ghost_maps[0],
        map_errors(ghost_maps, maps),
    )


def pair_errors(maps: Tensor, dw_size: int) -> PairErrors:
    """The errors of all pairs of `maps` (N x n x H x W) for one kernel size, with zero padding."""
    n = maps.shape[1]
    moments = PerMapMoments.zero(n, dw_size**2)
    for image_maps in maps.split(1):
        padded = F.pad(image_maps, (dw_size // 2,) * 4)
        moments.add(patches.unfold_neighbours(padded, dw_size), patches.flatten_positions(image_maps))
    statistics = replace(map_statistics(moments), rows=float("inf"))  # errors on these images, so no damping
    squared = statistics.pair_errors(torch.ones(n, dtype=torch.float64))
    squared.fill_diagonal_(float("inf"))
    variance = statistics.var
    return PairErrors(
        dw_size, squared, squared / variance.clamp_min(MIN_VARIANCE_SHARE * variance.max() + MIN_VARIANCE)
    )


def study_table(study: RedundancyStudy) -> Table:
    """The best pairs as in GhostNet's table 1, for a terminal."""
    facts = study.to_dict()
    sizes = [p.dw_size for p in study.pairs]
    table = Table(title=Text(printable(f"{study.layer}: {facts['maps']} maps")), box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("map from map, MSE (relative error)")
    for d in sizes:
        table.add_column(f"d={d}", justify="right")
    for pair in facts["pairs"]:
        cells = [f"{pair['mse'][d]:.2g} ({pair['relative_error'][d]:.3f})" for d in sizes]
        table.add_row(f"{pair['target']} from {pair['source']}", *cells)
    table.add_row("each map from its best, median", *(f"{facts['best_error_median'][d]:.3f}" for d in sizes))
    table.add_row(f"maps with an error below {SMALL_ERROR}", *(str(facts["maps_with_small_error"][d]) for d in sizes))
    return table


def write_study(study: RedundancyStudy, folder: Path, *, overwrite: bool = False) -> str:
    """Write study.json and the pictures into a folder; returns the JSON. Raises `GhostifyError` as `save` does."""
    text = json.dumps(study.to_dict(), indent=1)
    with staged_folder(folder, overwrite=overwrite) as staging:
        (staging / "study.json").write_text(text + "\n", encoding="utf-8")
        write_pictures(study, staging)
    return text


def write_pictures(study: RedundancyStudy, folder: Path) -> list[Path]:
    """Write pairs.png (a row each: source, prediction, target) and ghosts.png (originals above ghosts)."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = study.ranking_pairs
    pair_tiles = [tile for i, j in pairs.best(PAIRS_SHOWN) for tile in _pair_tiles(study.maps, i, j, pairs.dw_size)]
    ghosts = study.ghosts[:GHOSTS_SHOWN]
    ghost_tiles = [grey_tile(maps[k], study.maps[k]) for maps in (study.maps, study.ghost_maps) for k in ghosts]
    return [
        write_grid(pair_tiles, 3, folder / "pairs.png"),
        write_grid(ghost_tiles, len(ghosts), folder / "ghosts.png"),
    ]


def _pair_tiles(maps: Tensor, source: int, target: int, dw_size: int) -> list[Tensor]:
    """Tiles of a source map, of the best kernel's prediction from it, and of the target map."""
    padded = F.pad(maps[None, source : source + 1], (dw_size // 2,) * 4)
    neighbours = patches.unfold_neighbours(padded, dw_size).flatten(1).double()
    values = maps[target].flatten()[:, None].double()
    rows = torch.cat((neighbours, torch.ones_like(values)), 1)
    predicted = (rows @ torch.linalg.lstsq(rows, values).solution).reshape(maps[target].shape).float()
    return [
        grey_tile(maps[source], maps[source]),
        grey_tile(predicted, maps[target]),
        grey_tile(maps[target], maps[target]),
    ]
