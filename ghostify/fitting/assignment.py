"""Who is intrinsic, and whose ghosts the others are: matching and assignment on a matrix of errors, nothing else."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from typing_extensions import assert_never

from ghostify.errors import GhostifyError
from ghostify.modules.layout import Depthwise, GhostLayout, Grouped, Pointwise


@dataclass(frozen=True, eq=False)
class GhostAssignment:
    """`intrinsic` (G x w) and `ghosts` name original channels; `sources` (ghosts x w) computed maps."""

    intrinsic: Tensor
    ghosts: Tensor
    sources: Tensor

    @property
    def channels(self) -> Tensor:
        """The original channel of each computed map."""
        return torch.cat((self.intrinsic.flatten(), self.ghosts))

    def total(self, costs: Tensor) -> float:
        """The sum of costs[i, j] (n x n) over every ghost j and its intrinsic map i, for w = 1."""
        return float(costs[self.intrinsic[self.sources[:, 0], 0], self.ghosts].sum())

    def members(self) -> list[Tensor]:
        """All original channels of each group."""
        owner = self.sources[:, 0] // self.intrinsic.shape[1]
        return [torch.cat((own, self.ghosts[owner == g])) for g, own in enumerate(self.intrinsic)]


def assign_ghosts(costs: Tensor, layout: GhostLayout) -> GhostAssignment:
    """Groups of the shape of `layout` with a small sum of costs[i, j], the error of output j as a ghost of i (n x n).

    One ghost each: matching, then pair exchanges. Several: facility location, then assignment and new centres by turns.
    For ghosts that see w > 1 maps, channels that predict each other well come together; the first w stand as intrinsic.
    """
    match layout.form:
        case Depthwise():
            return _one_map_each(costs, layout)
        case Grouped() | Pointwise():
            return _wide(_clusters(costs, layout), layout)
        case _:
            assert_never(layout.form)


def _one_map_each(costs: Tensor, layout: GhostLayout) -> GhostAssignment:
    """Groups for ghosts that see one map each; those with the most ghosts come first, as the layout wants it."""
    costs = costs.clone().fill_diagonal_(0)
    capacities = layout.capacities
    centres, ghosts = _match_pairs(costs, layout) if max(capacities) == 1 else _cluster(costs, capacities)
    by_size = sorted(range(len(centres)), key=lambda k: -len(ghosts[k]))
    flat = [(k, ghost) for k, old in enumerate(by_size) for ghost in sorted(ghosts[old])]  # their places are alike
    return GhostAssignment(
        torch.tensor([[centres[old]] for old in by_size]),
        torch.tensor([ghost for _, ghost in flat]),
        torch.tensor([[k] for k, _ in flat]),
    )


def paper_assignment(layout: GhostLayout) -> GhostAssignment:
    """The paper's arrangement for w = 1: the first m outputs are intrinsic, ghost j belongs to map j modulo m."""
    if not isinstance(layout.form, Depthwise):
        raise GhostifyError(f"{layout}: its ghosts have no order of their own. Only depthwise ones have.")
    counts = layout.capacities
    waiting = iter(range(layout.intrinsic, layout.outputs))
    flat = [(k, next(waiting)) for k, count in enumerate(counts) for _ in range(count)]
    return GhostAssignment(
        torch.arange(layout.intrinsic)[:, None],
        torch.tensor([ghost for _, ghost in flat]),
        torch.tensor([[k] for k, _ in flat]),
    )


def _clusters(costs: Tensor, layout: GhostLayout) -> list[list[int]]:
    """Channels that predict each other well, in as many lists of one length as the layout has groups."""
    count = len(layout.capacities)
    if count == 1:
        return [list(range(layout.outputs))]
    centres, ghosts = _cluster((costs + costs.T) / 2, (layout.outputs // count - 1,) * count)
    return [[centre, *own] for centre, own in zip(centres, ghosts, strict=True)]


def _wide(members: list[list[int]], layout: GhostLayout) -> GhostAssignment:
    """Groups of which the first channels stand as intrinsic: as many as each ghost sees."""
    width = layout.kernel_shape[0]
    return GhostAssignment(
        torch.tensor([m[:width] for m in members]),
        torch.tensor([g for m in members for g in m[width:]]),
        torch.tensor([list(range(k * width, (k + 1) * width)) for k, m in enumerate(members) for _ in m[width:]]),
    )


def _match_pairs(costs: Tensor, layout: GhostLayout) -> tuple[list[int], list[list[int]]]:
    """Pairs with the better direction of each; with more intrinsic maps than ghosts, the costliest stay alone."""
    n, alone = layout.outputs, 2 * layout.intrinsic - layout.outputs
    both = torch.full((n + alone, n + alone), float("inf"), dtype=costs.dtype)
    both[:n, :n] = torch.minimum(costs, costs.T)
    both[n:, :n] = both[:n, n:] = 0  # a stand-in: whoever is paired with it stays alone
    both.fill_diagonal_(float("inf"))
    centres: list[int] = []
    ghosts: list[list[int]] = []
    for a, b in _pairs(both):
        if b >= n:
            centres.append(a)
            ghosts.append([])
        else:
            a, b = (a, b) if costs[a, b] <= costs[b, a] else (b, a)
            centres.append(a)
            ghosts.append([b])
    return centres, ghosts


def _pairs(costs: Tensor) -> list[tuple[int, int]]:
    """A perfect matching of small cost: assignment, its cycles cut into pairs, exchanges of partners while they pay."""
    big = costs[costs.isfinite()].max().item() * len(costs) + 1
    finite = costs.nan_to_num(posinf=big)
    _, partner = linear_sum_assignment(finite.numpy())
    pairs, left, seen = [], [], set()
    for first in range(len(costs)):
        cycle, k = [], first
        while k not in seen:
            seen.add(k)
            cycle.append(k)
            k = int(partner[k])
        if len(cycle) % 2:
            left.append(cycle.pop())
        pairs += list(zip(cycle[::2], cycle[1::2], strict=True))
    while left:
        a = left.pop(0)
        b = min(left, key=lambda k: finite[a, k].item())
        left.remove(b)
        pairs.append((a, b))
    a, b = torch.tensor(pairs).T.contiguous()
    while _swap_partners(finite, a, b, 1e-12 * big):
        pass
    return [(min(x, y), max(x, y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def _swap_partners(costs: Tensor, a: Tensor, b: Tensor, least: float) -> bool:
    """One round of exchanges of partners between pairs (a_k, b_k), in place: the best ones that do not touch."""
    now = costs[a, b]
    crossed = costs[a][:, a] + costs[b][:, b] - now[:, None] - now
    swapped = costs[a][:, b] + costs[b][:, a] - now[:, None] - now
    gains = torch.minimum(crossed, swapped).triu(1)
    gain, other = gains.min(1)
    free = set(range(len(a)))
    for i in gain.argsort().tolist():
        j = int(other[i])
        if gain[i] >= -least:
            break
        if i not in free or j not in free:
            continue
        free -= {i, j}
        if crossed[i, j] <= swapped[i, j]:
            b[i], a[j] = a[j].clone(), b[i].clone()
        else:
            b[i], b[j] = b[j].clone(), b[i].clone()
    return len(free) < len(a)


def _cluster(costs: Tensor, capacities: tuple[int, ...]) -> tuple[list[int], list[list[int]]]:
    """Centres and their ghosts, as many for each as `capacities` says in some order."""
    centres = _greedy_centres(costs, len(capacities))
    best: tuple[float, list[int], list[list[int]]] | None = None
    for _ in range(8):
        ghosts = _assign_to_centres(costs, centres, capacities)
        groups = [torch.tensor([c, *own]) for c, own in zip(centres, ghosts, strict=True)]
        inner = [costs[g[:, None], g].sum(1) for g in groups]
        total = sum(float(costs[c, own].sum()) for c, own in zip(centres, ghosts, strict=True))
        if best is not None and total >= best[0] * (1 - 1e-3):
            break
        best = (total, centres, ghosts)
        centres = [int(g[i.argmin()]) for g, i in zip(groups, inner, strict=True)]
    assert best is not None
    return best[1], best[2]


def _greedy_centres(costs: Tensor, count: int) -> list[int]:
    """Greedy facility location: each next centre lowers the sum of everyone's least cost the most.

    What a channel gains only shrinks as centres are added, so its last known gain is a bound (lazy greedy).
    """
    least = costs.max(0).values.clone()
    bounds = [(-float((least - row).clamp_min(0).sum()), k) for k, row in enumerate(costs)]
    heapq.heapify(bounds)
    chosen: list[int] = []
    while len(chosen) < count:
        _, k = heapq.heappop(bounds)
        gain = float((least - costs[k]).clamp_min(0).sum())
        if bounds and -gain > bounds[0][0]:
            heapq.heappush(bounds, (-gain, k))
            continue
        chosen.append(k)
        least = torch.minimum(least, costs[k])
    return chosen


def _assign_to_centres(costs: Tensor, centres: list[int], capacities: tuple[int, ...]) -> list[list[int]]:
    """The cheapest assignment; the places that every centre must fill carry a bonus, the one more of some does not."""
    low, high = min(capacities), max(capacities)
    waiting = [j for j in range(len(costs)) if j not in set(centres)]
    bonus = float(costs.max()) * len(costs) + 1
    places = [k for _ in range(high) for k in range(len(centres))]
    must = torch.tensor([bonus if level < low else 0.0 for level in range(high) for _ in centres], dtype=costs.dtype)
    matrix = costs[torch.tensor(centres)[places]][:, waiting] - must[:, None]
    ghosts: list[list[int]] = [[] for _ in centres]
    for row, column in zip(*linear_sum_assignment(matrix.numpy()), strict=True):
        ghosts[places[row]].append(waiting[column])
    return ghosts
