"""Copies that run ahead of any step: pages on their way back for requests that still wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from orbitflow_sglang.residency.page_table import PageState, PageTable
from orbitflow_sglang.residency.transfer import Transfer, TransferEngine


@dataclass
class UnderWay:
    """Copies under way: of pages (layer, page) as they were owned at the time."""

    transfer: Transfer
    layers: np.ndarray
    pages: np.ndarray
    generation: np.ndarray

    def present(self, table: PageTable) -> tuple[np.ndarray, np.ndarray]:
        """Those (layers, pages) that still belong to whom they did."""
        ours = table.generation[self.pages] == self.generation
        return self.layers[ours], self.pages[ours]


class Arrivals:
    """Fetches to arena pages outside the ring, of pages that no step reads yet.

    ``grant(n)`` gives up to n such arena pages, ``grant_extents(n)`` up to n extents.
    Fetched pages are TO_DEVICE until ``complete``, which waits: it comes a step later,
    before anything may touch them.
    """

    def __init__(
        self,
        table: PageTable,
        engine: TransferEngine,
        grant: Callable[[int], np.ndarray],
        grant_extents: Callable[[int], np.ndarray],
    ) -> None:
        self._table = table
        self._engine = engine
        self._grant = grant
        self._grant_extents = grant_extents
        self._under_way: list[UnderWay] = []

    def missing(self, pages: np.ndarray) -> int:
        """Copies that ``pages`` lack in the arena although they should live there."""
        return int(self._away(pages).sum())

    def fetch(self, pages: np.ndarray, limit: int) -> int:
        """Start fetching up to ``limit`` of the missing copies of ``pages``; how many.

        Pages that lack all of them come back to extents, while there are any.
        """
        table = self._table
        away = self._away(pages)
        if not away.any():
            return 0
        whole = pages[away.all(axis=0)][: limit // table.layers]
        starts = self._grant_extents(len(whole))
        whole = whole[: len(starts)]
        table.set_extents(whole, starts)
        layers = np.repeat(np.arange(table.layers), len(whole))
        self._start(layers, np.tile(whole, table.layers))

        columns, layers = np.nonzero(self._away(pages).T)
        home = self._grant(min(limit - table.layers * len(whole), len(layers)))
        layers, chosen = layers[: len(home)], pages[columns[: len(home)]]
        table.device_page[layers, chosen] = home
        self._start(layers, chosen)
        return table.layers * len(whole) + len(home)

    def _start(self, layers: np.ndarray, pages: np.ndarray) -> None:
        """Fetch to the arena pages that the table already says."""
        table = self._table
        if len(pages):
            table.state[layers, pages] = PageState.TO_DEVICE
            transfer = self._engine.fetch(
                table.host_page[layers, pages], table.device_page[layers, pages]
            )
            self._under_way.append(UnderWay(transfer, layers, pages, table.generation[pages]))

    def targets(self) -> np.ndarray:
        """Arena page that each (layer, page) is on its way to, or -1; for checks."""
        target = np.full_like(self._table.device_page, -1)
        for under_way in self._under_way:
            layers, pages = under_way.present(self._table)
            target[layers, pages] = self._table.device_page[layers, pages]
        return target

    def complete(self) -> None:
        """Wait for what is under way; its pages then have two valid copies."""
        for under_way in self._under_way:
            under_way.transfer.wait()
            layers, pages = under_way.present(self._table)
            self._table.state[layers, pages] = PageState.BOTH
        self._under_way.clear()

    def _away(self, pages: np.ndarray) -> np.ndarray:
        table = self._table
        away: np.ndarray = (table.state[:, pages] == PageState.HOST) & ~table.want_host[:, pages]
        return away
