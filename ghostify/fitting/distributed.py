"""Rank, number of processes, sums and rows over the processes of a `torch.distributed` group."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process and the number of processes; 0 and 1 without an initialised process group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def all_reduce_sum(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The sum of each tensor over all processes; the tensors themselves with one process."""
    if rank_and_world_size()[1] == 1:
        return tensors
    copies = tuple(t.clone() for t in tensors)
    for tensor in copies:
        distributed.all_reduce(tensor)
    return copies


def all_gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; the numbers of rows may differ."""
    rank, processes = rank_and_world_size()
    if processes == 1:
        return rows
    counts = torch.zeros(processes)
    counts[rank] = len(rows)
    ends = all_reduce_sum(counts)[0].cumsum(0).long().tolist()
    gathered = torch.zeros(ends[-1], *rows.shape[1:])
    gathered[ends[rank] - len(rows) : ends[rank]] = rows.float()
    return all_reduce_sum(gathered)[0].to(rows.dtype)
