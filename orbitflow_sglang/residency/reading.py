"""How one forward pass reads its pages: layer by layer, in as many parts as the ring needs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.device import to_device
from orbitflow_sglang.residency.page_table import PageTable
from orbitflow_sglang.residency.staging import StagingRing
from orbitflow_sglang.residency.step import NO_PAGES, LayerPass, Step


class Reading:
    """The reads of ``step``, made when all its fetches have been asked of the ring.

    A page that no piece of the ring has stays where it is for the whole pass, so where
    nothing is fetched the ids of all layers come from one look-up.
    """

    def __init__(
        self, step: Step, table: PageTable, arena: Arena, ring: StagingRing, page_size: int
    ) -> None:
        self._step = step
        self._table = table
        self._arena = arena
        self._ring = ring
        self._page_size = page_size
        self._pages = np.concatenate([NO_PAGES, *step.reads])
        self._counts = [len(read) for read in step.reads]
        self._device = arena.k.device
        self._ids = to_device(table.device_page[:, self._pages], self._device)

    def passes(self, layer: int) -> Iterator[LayerPass]:
        """The parts in which ``layer`` is attended; a part is valid until the next is asked for."""
        ring = self._ring
        pieces = ring.pieces(layer)
        if not pieces:
            yield LayerPass(
                self._arena.k, self._arena.v, self._ids[layer], self._counts,
                self._step.read_tokens, whole=True,
            )  # fmt: skip
        elif ring.in_one_pass(layer):
            for piece in pieces:
                ring.wait(piece)
            ids = self._table.device_page[layer, self._pages]
            yield self._pass(ids, self._counts, self._step.read_tokens, whole=True)
            for piece in pieces:
                ring.release(piece)
        else:
            staged = np.concatenate([piece.pages for piece in pieces])
            yield self._part(layer, staged, invert=True)
            for piece in pieces:
                ring.wait(piece)
                yield self._part(layer, piece.pages)
                ring.release(piece)
                ring.pump(layer)
        ring.pump(layer + 1)

    def _pass(
        self, ids: np.ndarray, counts: list[int], tokens: list[int], whole: bool
    ) -> LayerPass:
        on_device = to_device(ids, self._device)
        return LayerPass(self._arena.k, self._arena.v, on_device, counts, tokens, whole)

    def _part(self, layer: int, pages: np.ndarray, invert: bool = False) -> LayerPass:
        """Only those pages of every request that are in ``pages`` (or are not)."""
        wanted = np.full(self._table.in_use.shape, invert)
        wanted[pages] = not invert
        reads, tokens = self._step.part(wanted, self._page_size)
        ids = self._table.device_page[layer, np.concatenate([NO_PAGES, *reads])]
        return self._pass(ids, [len(read) for read in reads], tokens, whole=False)
