"""Pages that lie scattered in the arena are moved back into extents.

A page that leaves in some layers and comes back takes whatever single pages are free.
Steps that read such pages need tables, and copies to and from them no longer run over
neighbours, so what stays on the device is gathered again, a little at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.device import to_device
from orbitflow_sglang.residency.page_table import PageState, PageTable

# Of the pages that a step reads one in so many is gathered: moving those adds at most a
# quarter to what its attention reads anyway, for a few steps.
SHARE = 16
MOST_PAGES = 16  # in a step: each takes some Python

NOBODY, FREE = -1, -2


class Gathering:
    """Gives each page the extent that already has most of it.

    What else lies in that extent moves to where the page was, so no room is needed. Each
    page that is gathered stays so, and only pages in no extent ever move.
    """

    def __init__(
        self, table: PageTable, arena: Arena, compute: Callable[[Callable[[], None]], None]
    ) -> None:
        self._table = table
        self._arena = arena
        self._compute = compute
        # Of each arena page: flat index of the (layer, page) that may be moved from it,
        # ``FREE`` or ``NOBODY``; filled in for one call only, like the next one.
        self._owner = np.full(arena.ring_start, NOBODY, dtype=np.int64)
        self._content = np.arange(arena.ring_start)  # where what belongs there still lies

    def gather(self, pages: np.ndarray) -> int:
        """Gather some of ``pages``, those alone that no copy reads or writes; how many.

        Between two steps. Host copies stay as they are.
        """
        table = self._table
        loose = pages[table.extent[pages] < 0]
        if not len(loose):
            return 0
        staying = self._movable(loose) & ~table.want_host[:, loose]
        loose = loose[staying.all(axis=0)][: min(MOST_PAGES, -(-len(pages) // SHARE))]
        if not len(loose):
            return 0
        free = self._arena.free_singles()
        others = np.flatnonzero(table.in_use & (table.extent < 0))
        layers, columns = np.nonzero(self._movable(others))
        places = table.device_page[layers, others[columns]]
        self._owner[free] = FREE
        self._owner[places] = layers * len(table.in_use) + others[columns]
        gathered = sum(self._complete(page) for page in loose.tolist())
        known = np.concatenate([free, places])
        self._move(known[self._content[known] != known])
        self._arena.set_free_singles(known[self._owner[known] == FREE])
        self._owner[known] = NOBODY
        return gathered

    def _movable(self, pages: np.ndarray) -> np.ndarray:
        """Where ``pages`` may be moved, bool ``[layers, len(pages)]``."""
        state, place = self._table.state[:, pages], self._table.device_page[:, pages]
        movable: np.ndarray = (state == PageState.DEVICE) | (state == PageState.BOTH)
        return movable & (place < self._arena.ring_start)

    def _complete(self, page: int) -> bool:
        """Decide that ``page`` lies in one extent; False when some other page is busy there."""
        table, stride, owner = self._table, self._arena.stride, self._owner
        place = table.device_page[:, page].copy()
        in_extents = place[place < stride * table.layers]
        if not len(in_extents):
            return False
        start = int(np.bincount(in_extents % stride).argmax())
        target = table.extent_pages(start)
        wrong = np.flatnonzero(place != target)
        source, target = place[wrong], target[wrong]
        left = source[~np.isin(source, target)]
        entered = target[~np.isin(target, source)]
        holders = owner[entered]
        if (holders == NOBODY).any():
            return False
        pushed = holders >= 0
        there = left[: pushed.sum()]
        self._content[np.concatenate([target, there])] = self._content[
            np.concatenate([source, entered[pushed]])
        ]
        table.device_page[wrong, page] = target
        table.device_page.reshape(-1)[holders[pushed]] = there
        owner[left] = FREE
        owner[there] = holders[pushed]
        owner[target] = wrong * len(table.in_use) + page
        table.extent[page] = start
        return True

    def _move(self, changed: np.ndarray) -> None:
        device = self._arena.k.device
        target = to_device(changed.astype(np.int64), device)
        source = to_device(self._content[changed], device)

        def move() -> None:
            for tensor in (self._arena.k, self._arena.v):
                tensor[target] = tensor[source]  # read whole before any of it is written

        self._compute(move)
        self._content[changed] = changed
