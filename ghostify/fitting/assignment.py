"""Choice of intrinsic maps and assignment of ghosts to them: matching and facility location on a matrix of errors."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from typing_extensions import assert_never

from ghostify.errors import GhostifyError
from ghostify.modules.layout import Depthwise, GhostLayout, Grouped, Pointwise

MAX_CLUSTER_STEPS = 8
MIN_CLUSTER_GAIN = 1e-3


@dataclass(frozen=True, eq=False)
class GhostAssignment:
    """Groups of G x w intrinsic maps and their ghosts.

    `intrinsic` (G x w) and `ghosts` hold original channels; `sources` (ghosts x w) holds indices of computed maps.
    """

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
        return [torch.cat((intrinsic, self.ghosts[owner == g])) for g, intrinsic in enumerate(self.intrinsic)]


def assign_ghosts(costs: Tensor, layout: GhostLayout) -> GhostAssignment:
    """Groups of the shape of `layout` with a small sum of costs[i, j], the error of output j as a ghost of i (n x n).

    With one ghost for each intrinsic map: matching, then pair exchanges. With several: facility location, then
    alternately assignment and new centres. For ghosts that read w > 1 maps, channels that predict each other well form
    a group, and the first w of a group are intrinsic.
    """
    match layout.form:
        case Depthwise():
            return _assign_depthwise(costs, layout)
        case Grouped() | Pointwise():
            return _assign_grouped(_clusters(costs, layout), layout)
        case _:
            assert_never(layout.form)


def _assign_depthwise(costs: Tensor, layout: GhostLayout) -> GhostAssignment:
    """The assignment of ghosts that read one map each; maps with the most ghosts come first, as in the layout."""
    costs = costs.clone().fill_diagonal_(0)
    capacities = layout.capacities
    centres, ghosts = _match_pairs(costs, layout) if max(capacities) == 1 else _cluster(costs, capacities)
    by_size = sorted(range(len(centres)), key=lambda k: -len(ghosts[k]))
    ranked = [(k, ghost) for k, old in enumerate(by_size) for ghost in sorted(ghosts[old])]
    return GhostAssignment(
        torch.tensor([[centres[old]] for old in by_size]),
        torch.tensor([ghost for _, ghost in ranked]),
        torch.tensor([[k] for k, _ in ranked]),
    )


def paper_assignment(layout: GhostLayout) -> GhostAssignment:
    """The paper's assignment for w = 1: the first m outputs are intrinsic, the following ones their ghosts in order.

    Raises `GhostifyError` for other forms than depthwise.
    """
    if not isinstance(layout.form, Depthwise):
        raise GhostifyError(f"{layout}: the paper's assignment needs depthwise ghosts. Use a depthwise layout.")
    counts = layout.capacities
    remaining = iter(range(layout.intrinsic, layout.outputs))
    ranked = [(k, next(remaining)) for k, count in enumerate(counts) for _ in range(count)]
    return GhostAssignment(
        torch.arange(layout.intrinsic)[:, None],
        torch.tensor([ghost for _, ghost in ranked]),
        torch.tensor([[k] for k, _ in ranked]),
    )


def _clusters(costs: Tensor, layout: GhostLayout) -> list[list[int]]:
    """As many lists of equal length as the layout has groups, of channels that predict each other well."""
    count = len(layout.capacities)
    if count == 1:
        return [list(range(layout.outputs))]
    centres, ghosts = _cluster((costs + costs.T) / 2, (layout.outputs // count - 1,) * count)
    return [[centre, *ghosts_of_centre] for centre, ghosts_of_centre in zip(centres, ghosts, strict=True)]


def _assign_grouped(members: list[list[int]], layout: GhostLayout) -> GhostAssignment:
    """The assignment in which the first channels of each group are intrinsic: as many as each ghost reads."""
    width = layout.kernel_shape[0]
    return GhostAssignment(
        torch.tensor([m[:width] for m in members]),
        torch.tensor([g for m in members for g in m[width:]]),
        torch.tensor([list(range(k * width, (k + 1) * width)) for k, m in enumerate(members) for _ in m[width:]]),
    )


def _match_pairs(costs: Tensor, layout: GhostLayout) -> tuple[list[int], list[list[int]]]:
    """Pairs with the better direction of each; with more intrinsic maps than ghosts, the costliest have no ghost."""
    n, single_count = layout.outputs, 2 * layout.intrinsic - layout.outputs
    pair_costs = torch.full((n + single_count, n + single_count), float("inf"), dtype=costs.dtype)
    pair_costs[:n, :n] = torch.minimum(costs, costs.T)
    pair_costs[n:, :n] = pair_costs[:n, n:] = 0  # a placeholder: the map paired with it has no ghost
    pair_costs.fill_diagonal_(float("inf"))
    centres: list[int] = []
    ghosts: list[list[int]] = []
    for a, b in _perfect_matching(pair_costs):
        if b >= n:
            centres.append(a)
            ghosts.append([])
        else:
            a, b = (a, b) if costs[a, b] <= costs[b, a] else (b, a)
            centres.append(a)
            ghosts.append([b])
    return centres, ghosts


def _perfect_matching(costs: Tensor) -> list[tuple[int, int]]:
    """A perfect matching of small cost: linear assignment, its cycles split into pairs, then exchanges that pay."""
    upper_bound = costs[costs.isfinite()].max().item() * len(costs) + 1
    finite = costs.nan_to_num(posinf=upper_bound)
    _, successor = linear_sum_assignment(finite.numpy())
    pairs, unpaired, visited = [], [], set()
    for first in range(len(costs)):
        cycle, k = [], first
        while k not in visited:
            visited.add(k)
            cycle.append(k)
            k = int(successor[k])
        if len(cycle) % 2:
            unpaired.append(cycle.pop())
        pairs += list(zip(cycle[::2], cycle[1::2], strict=True))
    while unpaired:
        a = unpaired.pop(0)
        b = min(unpaired, key=lambda k: finite[a, k].item())
        unpaired.remove(b)
        pairs.append((a, b))
    a, b = torch.tensor(pairs).T.contiguous()
    while _swap_partners(finite, a, b, 1e-12 * upper_bound):
        pass
    return [(min(x, y), max(x, y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def _swap_partners(costs: Tensor, a: Tensor, b: Tensor, min_gain: float) -> bool:
    """One round of exchanges of partners between pairs (a_k, b_k), in place: the best ones that share no pair."""
    current = costs[a, b]
    crossed = costs[a][:, a] + costs[b][:, b] - current[:, None] - current
    swapped = costs[a][:, b] + costs[b][:, a] - current[:, None] - current
    changes = torch.minimum(crossed, swapped).triu(1)
    change, other = changes.min(1)
    free = set(range(len(a)))
    for i in change.argsort().tolist():
        j = int(other[i])
        if change[i] >= -min_gain:
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
    """Centres and their ghosts; the numbers of ghosts are those of `capacities` in some order."""
    centres = _greedy_centres(costs, len(capacities))
    best: tuple[float, list[int], list[list[int]]] | None = None
    for _ in range(MAX_CLUSTER_STEPS):
        ghosts = _assign_to_centres(costs, centres, capacities)
        clusters = [torch.tensor([c, *g]) for c, g in zip(centres, ghosts, strict=True)]
        sums = [costs[members[:, None], members].sum(1) for members in clusters]
        total = sum(float(costs[c, g].sum()) for c, g in zip(centres, ghosts, strict=True))
        if best is not None and total >= best[0] * (1 - MIN_CLUSTER_GAIN):
            break
        best = (total, centres, ghosts)
        centres = [int(members[s.argmin()]) for members, s in zip(clusters, sums, strict=True)]
    assert best is not None
    return best[1], best[2]


def _greedy_centres(costs: Tensor, count: int) -> list[int]:
    """Greedy facility location: each next centre lowers the sum over channels of the least cost the most.

    The gain of a channel only shrinks as centres are added, so its last known gain is a bound (lazy greedy).
    """
    least = costs.max(0).values.clone()
    bounds = [(-float((least - row).clamp_min(0).sum()), k) for k, row in enumerate(costs)]
    heapq.heapify(bounds)
    centres: list[int] = []
    while len(centres) < count:
        _, k = heapq.heappop(bounds)
        gain = float((least - costs[k]).clamp_min(0).sum())
        if bounds and -gain > bounds[0][0]:
            heapq.heappush(bounds, (-gain, k))
            continue
        centres.append(k)
        least = torch.minimum(least, costs[k])
    return centres


def _assign_to_centres(costs: Tensor, centres: list[int], capacities: tuple[int, ...]) -> list[list[int]]:
    """The cheapest assignment; slots that every centre must fill carry a bonus, the additional ones of some do not."""
    low, high = min(capacities), max(capacities)
    ghosts = [j for j in range(len(costs)) if j not in set(centres)]
    bonus = float(costs.max()) * len(costs) + 1
    slots = [k for _ in range(high) for k in range(len(centres))]
    bonuses = torch.tensor([bonus if level < low else 0.0 for level in range(high) for _ in centres], dtype=costs.dtype)
    matrix = costs[torch.tensor(centres)[slots]][:, ghosts] - bonuses[:, None]
    assigned: list[list[int]] = [[] for _ in centres]
    for row, column in zip(*linear_sum_assignment(matrix.numpy()), strict=True):
        assigned[slots[row]].append(ghosts[column])
    return assigned
