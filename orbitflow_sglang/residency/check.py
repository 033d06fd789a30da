"""The invariants that hold between any two steps, each as a sentence when it does not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.host_store import HostStore
from orbitflow_sglang.residency.page_table import PageState, PageTable
from orbitflow_sglang.residency.staging import StagingRing

# Which copies each state stands for: (arena, host); None where either is possible.
COPIES: dict[PageState, tuple[bool | None, bool]] = {
    PageState.FREE: (False, False),
    PageState.DEVICE: (True, False),
    PageState.HOST: (False, True),
    PageState.BOTH: (True, True),
    PageState.STAGED: (True, True),
    PageState.TO_DEVICE: (True, True),
    PageState.TO_HOST: (None, True),
}


def violations(
    table: PageTable,
    arena: Arena,
    host: HostStore,
    ring: StagingRing,
    leaving: np.ndarray,
    arriving: np.ndarray,
) -> list[str]:
    """What is wrong, in words; empty when every invariant holds.

    ``leaving``, bool ``[layers, logical_pages]``, is where a copy to the host is under way;
    ``arriving``, int ``[layers, logical_pages]``, the arena page that one is fetched to, or -1.
    """
    return [
        *_states(table, arena),
        *_under_way(table, leaving, arriving),
        *_arena(table, arena, ring),
        *_host(table, host),
        *_extents(table, arena),
    ]


def _states(table: PageTable, arena: Arena) -> Iterator[str]:
    if (table.in_use[None, :] == (table.state == PageState.FREE)).any():
        yield "a page is in use in some layers only"
    for state, (in_arena, on_host) in COPIES.items():
        here = table.state == state
        if in_arena is not None and ((table.device_page[here] >= 0) != in_arena).any():
            yield f"{state.name} pages {'without' if in_arena else 'with'} an arena page"
        if ((table.host_page[here] >= 0) != on_host).any():
            yield f"{state.name} pages {'without' if on_host else 'with'} a host page"
    in_ring = table.device_page >= arena.ring_start
    if (table.state == PageState.STAGED).any():
        yield "a page is staged for a pass that is over"
    if (in_ring & (table.state != PageState.TO_DEVICE)).any():
        yield "a ring page outlives its pass"


def _under_way(table: PageTable, leaving: np.ndarray, target: np.ndarray) -> Iterator[str]:
    if ((table.state == PageState.TO_HOST) & ~leaving).any():
        yield "TO_HOST pages with no copy under way"
    if (leaving & (table.state != PageState.TO_HOST)).any():
        yield "a copy to the host is under way for pages that are not TO_HOST"
    if ((table.state == PageState.TO_DEVICE) != (target >= 0)).any():
        yield "other pages are fetched than those that are TO_DEVICE"
    if (table.device_page != target)[target >= 0].any():
        yield "a page is being fetched to where the table does not say"


def _arena(table: PageTable, arena: Arena, ring: StagingRing) -> Iterator[str]:
    owned = table.device_page[:, 1:]
    claims = np.concatenate([owned[owned >= 0], arena.free_pages(), ring.free_pages()])
    count = np.bincount(claims, minlength=arena.num_pages)
    if count[arena.padding_pages].any():
        yield "the padding extent was handed out"
    count[arena.padding_pages] = 1
    if (lost := np.flatnonzero(count == 0)).size:
        yield f"{lost.size} arena pages have no owner: {lost[:8]}"
    if (twice := np.flatnonzero(count > 1)).size:
        yield f"{twice.size} arena pages have two owners: {twice[:8]}"


def _host(table: PageTable, host: HostStore) -> Iterator[str]:
    owned = table.host_page[table.host_page >= 0]
    if len(np.unique(owned)) != len(owned):
        yield "a host page has two owners"
    if host.is_free(owned).any():
        yield "a host page in use is marked free"
    free = int(host.is_free(np.arange(host.num_pages)).sum())
    if free != host.num_free:
        yield f"{free} host pages are free, counted as {host.num_free}"
    if len(owned) + free != host.num_pages:
        yield f"{host.num_pages - free - len(owned)} host pages have no owner"


def _extents(table: PageTable, arena: Arena) -> Iterator[str]:
    whole = np.flatnonzero(table.extent >= 0)
    layers = np.arange(table.layers, dtype=np.int32)[:, None]
    expected = table.extent[whole] + arena.stride * layers
    if (table.device_page[:, whole] != expected).any():
        yield "a page is not where its extent says"
