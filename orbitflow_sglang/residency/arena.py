"""The device arena: one flat tensor of physical pages that all layers share.

A logical page that is resident in every layer takes an *extent*: ``layers``
adjacent physical pages, layer ``l`` in the ``l``-th. Seen through a view that
starts ``l`` pages into the storage, its page has the same index in every layer,
so one index array serves them all. Where no extent is free, pages are taken
singly and the page table says where each layer's page is.

Physical pages, in order: one extent that absorbs the writes of padding tokens
(SGLang's slot 0), the extents, what is left over, and the staging ring.
"""

from __future__ import annotations

import numpy as np
import torch

from orbitflow_sglang.residency import ResidencyError
from orbitflow_sglang.residency.layout import Capacity, KVLayout


class PageStack:
    """Page ids in an array that never grows; popped from the end."""

    def __init__(self, capacity: int) -> None:
        self._ids = np.empty(capacity, dtype=np.int32)
        self.size = 0

    def push(self, ids: np.ndarray) -> None:
        """Put ``ids`` on the stack, in any integer dtype."""
        self._ids[self.size : self.size + len(ids)] = ids
        self.size += len(ids)

    def pop(self, count: int) -> np.ndarray:
        """Take the last ``count``, of which there must be so many; int32, as pushed."""
        self.size -= count
        return self._ids[self.size : self.size + count].copy()

    def values(self) -> np.ndarray:
        """All of them, as a view that does not outlive the next push."""
        return self._ids[: self.size]


class Arena:
    """Tensors and free lists. Page ids are physical; extents are named by their first page."""

    def __init__(self, layout: KVLayout, capacity: Capacity, device: str) -> None:
        self.layers = layout.layers
        self.first_page = layout.layers  # after the extent for padding
        self.ring_start = self.first_page + capacity.main_pages
        self.num_pages = capacity.arena_pages
        self.k, self.v = layout.empty(self.first_page + capacity.arena_pages, device, False)
        # Padding tokens write, and masked lanes may read, the first extent.
        self.k[: self.first_page].zero_()
        self.v[: self.first_page].zero_()
        self.reset()

    def reset(self) -> None:
        """Every page free again; contents undefined."""
        extents, rest = divmod(self.ring_start - self.first_page, self.layers)
        starts = self.first_page + self.layers * np.arange(extents, dtype=np.int32)
        self._extents = PageStack(extents)
        self._extents.push(starts[::-1])  # low pages are handed out first
        self._singles = PageStack(self.ring_start - self.first_page)
        self._singles.push(np.arange(self.ring_start - rest, self.ring_start, dtype=np.int32))
        self._returned = 0  # single pages given back since the last search for whole extents

    @property
    def ring_pages(self) -> np.ndarray:
        return np.arange(self.ring_start, self.first_page + self.num_pages, dtype=np.int32)

    @property
    def num_free(self) -> int:
        return self._extents.size * self.layers + self._singles.size

    def free_pages(self) -> np.ndarray:
        """Every free page outside the ring, for checks."""
        return np.concatenate([self._pages_of(self._extents.values()), self._singles.values()])

    def take_extents(self, count: int) -> np.ndarray:
        """First pages of up to ``count`` extents: fewer where fewer are whole."""
        if self._extents.size < count:
            self._coalesce()
        return self._extents.pop(min(count, self._extents.size))

    def take_pages(self, count: int) -> np.ndarray:
        """``count`` single pages, from broken extents first.

        Raises ``ResidencyError`` when fewer are free: callers make room first.
        """
        if count > self.num_free:
            raise ResidencyError(f"{count} arena pages wanted, {self.num_free} free")
        if (short := count - self._singles.size) > 0:
            self._singles.push(self._pages_of(self._extents.pop(-(-short // self.layers))))
        return self._singles.pop(count)

    def give_extents(self, starts: np.ndarray) -> None:
        self._extents.push(starts)

    def give_pages(self, pages: np.ndarray) -> None:
        self._singles.push(pages)
        self._returned += len(pages)

    def _pages_of(self, starts: np.ndarray) -> np.ndarray:
        return (starts[:, None] + np.arange(self.layers, dtype=np.int32)).reshape(-1)

    def _coalesce(self) -> None:
        """Single pages that together make whole extents become extents again."""
        if not self._returned:
            return
        self._returned = 0
        singles = self._singles.pop(self._singles.size)
        group = (singles - self.first_page) // self.layers
        whole = np.flatnonzero(np.bincount(group) == self.layers)
        self._extents.push(self.first_page + self.layers * whole)
        self._singles.push(singles[~np.isin(group, whole)])

    def layer_view(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V seen by ``layer`` when pages are named by the start of their extent."""
        return self.k[layer:], self.v[layer:]
