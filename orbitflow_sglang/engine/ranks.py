"""The ranks of a server: replicas (DP) that share a host, and groups (TP) that act as one.

Every rank of a tensor-parallel group holds its heads' share of the same pages and must keep
them in the same places: the first one decides, and nothing may depend on one rank's clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import broadcast_pyobj


def on_this_host() -> int:
    """Ranks that share this host's memory: all of the server, which runs on one host."""
    parallel = get_parallel()
    count: int = parallel.tp_size * parallel.dp_size
    return count


def in_lockstep() -> bool:
    """Whether other ranks must do exactly what this one does."""
    several: bool = get_parallel().tp_size > 1
    return several


def leads() -> bool:
    """Whether this rank decides for its group."""
    first: bool = get_parallel().tp_rank == 0
    return first


def smallest(numbers: Sequence[int]) -> list[int]:
    """The least that any rank of the group has, number by number. All ranks must call."""
    if not in_lockstep():
        return list(numbers)
    least = torch.tensor(numbers, dtype=torch.int64)
    group = get_parallel().tp_group.cpu_group
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=group)
    return [int(number) for number in least]


def from_leader(thing: Any) -> Any:
    """The leader's ``thing`` on every rank of the group. All ranks must call."""
    if not in_lockstep():
        return thing
    group = get_parallel().tp_group
    (sent,) = broadcast_pyobj([thing], group.rank, group.cpu_group, src=group.ranks[0])
    return sent


def of_all(thing: Any) -> list[Any]:
    """Every rank's ``thing``, in the order of the ranks. All ranks of the group must call."""
    found = [thing] * get_parallel().tp_size
    if in_lockstep():
        group = get_parallel().tp_group.cpu_group
        torch.distributed.all_gather_object(found, thing, group=group)
    return found
