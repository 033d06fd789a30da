"""Copies to the host that are under way, and when a page counts as being there."""

from __future__ import annotations

from collections import deque

import numpy as np

from orbitflow_sglang.residency.ahead import UnderWay
from orbitflow_sglang.residency.page_table import PageState, PageTable
from orbitflow_sglang.residency.transfer import Transfer


class WriteBacks:
    """Oldest first, which is the order in which they end.

    A page is TO_HOST until its copy is noted here; what becomes of it next depends on that.
    ``in_lockstep`` nothing depends on how fast copies are: only those are noted that were
    waited for, so that ranks with the same steps have the same tables.
    """

    def __init__(self, table: PageTable, in_lockstep: bool) -> None:
        self._table = table
        self._in_lockstep = in_lockstep
        self._under_way: deque[UnderWay] = deque()

    def __len__(self) -> int:
        return len(self._under_way)

    def track(self, transfer: Transfer, layers: np.ndarray, pages: np.ndarray) -> None:
        """A copy of pages (layer, page) has been queued behind all others."""
        generation = self._table.generation[pages]
        self._under_way.append(UnderWay(transfer, layers, pages, generation))

    def note(self) -> None:
        """Note those that have ended; in lockstep all, once they have."""
        while self._under_way and (self._in_lockstep or self._under_way[0].transfer.done):
            self._note_first()

    def await_first(self) -> None:
        """Wait for the oldest one, and note it."""
        self._note_first()
        if not self._in_lockstep:
            self.note()

    def bound(self, most: int) -> None:
        """Return when fewer than ``most`` are under way, noted or not."""
        if len(self._under_way) >= most:
            self._under_way[-most].transfer.wait()

    def clear(self) -> None:
        """Forget them all."""
        self._under_way.clear()

    def leaving(self) -> np.ndarray:
        """Whether each (layer, page) has a copy under way; for checks."""
        leaving = np.zeros_like(self._table.want_host)
        for under_way in self._under_way:
            leaving[under_way.present(self._table)] = True
        return leaving

    def _note_first(self) -> None:
        table = self._table
        self._under_way[0].transfer.wait()
        layers, pages = self._under_way.popleft().present(table)
        kept = table.device_page[layers, pages] >= 0
        table.state[layers, pages] = np.where(kept, PageState.BOTH, PageState.HOST)
