"""The device arena: one flat tensor of physical pages that all layers share.

A logical page that is resident in every layer takes an *extent*: one physical
page for each layer, ``stride`` pages apart. Seen through a view that starts
``layer * stride`` pages into the storage, its page has the same index in every
layer, so one index array serves them all; and extents taken one after another
are adjacent in each layer, as in a pool with a buffer for each layer. Where no
extent is free, pages are taken singly and the page table says where each
layer's page is.

Physical pages, in order: the extents, layer by layer, of which number 0 absorbs
the writes of padding tokens (SGLang's slot 0); what is left over; the staging ring.
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
        """Take the last ``count``, of which there must be so many; int32, as pushed.

        What was pushed in a run comes back in one, so that a copy stays a run.
        """
        self.size -= count
        return self._ids[self.size : self.size + count].copy()

    def values(self) -> np.ndarray:
        """All of them, as a view that does not outlive the next push."""
        return self._ids[: self.size]


class Arena:
    """Tensors and free lists. Page ids are physical; extents are named by their first page,
    which is also their index in every layer's view."""

    def __init__(self, layout: KVLayout, capacity: Capacity, device: str) -> None:
        self.layers = layout.layers
        extents, self._rest = divmod(capacity.main_pages, self.layers)
        self.stride = 1 + extents  # one for padding
        self.ring_start = self.layers + capacity.main_pages
        self.num_pages = self.layers + capacity.arena_pages
        self.k, self.v = layout.empty(self.num_pages, device)
        # Padding tokens write, and masked lanes may read, the first extent.
        self.k[self.padding_pages] = 0
        self.v[self.padding_pages] = 0
        self.reset()

    def reset(self) -> None:
        """Every page free again; contents undefined."""
        self._extents = PageStack(self.stride - 1)
        # Low pages are handed out first.
        self._extents.push(np.arange(1, self.stride, dtype=np.int32)[::-1])
        self._singles = PageStack(self.ring_start - self.layers)
        singles = np.arange(self.ring_start - self._rest, self.ring_start, dtype=np.int32)
        self._singles.push(singles)
        self._returned = 0  # single pages given back since the last search for whole extents

    @property
    def padding_pages(self) -> np.ndarray:
        """The pages that nobody owns."""
        return self._pages_of(np.zeros(1, dtype=np.int32))

    @property
    def ring_pages(self) -> np.ndarray:
        return np.arange(self.ring_start, self.num_pages, dtype=np.int32)

    @property
    def num_free(self) -> int:
        return self._extents.size * self.layers + self._singles.size

    def free_pages(self) -> np.ndarray:
        """Every free page outside the ring, for checks."""
        return np.concatenate([self._pages_of(self._extents.values()), self._singles.values()])

    def take_extents(self, count: int) -> np.ndarray:
        """First pages of up to ``count`` extents, adjacent ones in order: fewer where fewer
        are whole."""
        if self._extents.size < count:
            self._coalesce()
        return self._extents.pop(min(count, self._extents.size))[::-1]

    def take_pages(self, count: int) -> np.ndarray:
        """``count`` single pages, from broken extents first.

        Raises ``ResidencyError`` when fewer are free: callers make room first.
        """
        if count > self.num_free:
            raise ResidencyError(f"{count} arena pages wanted, {self.num_free} free")
        if self._returned >= self.layers:
            self._coalesce()
        if (short := count - self._singles.size) > 0:
            self._singles.push(self._pages_of(self.take_extents(-(-short // self.layers))))
        return self._singles.pop(count)

    def give_extents(self, starts: np.ndarray) -> None:
        self._extents.push(starts[::-1])

    def give_pages(self, pages: np.ndarray) -> None:
        self._singles.push(pages)
        self._returned += len(pages)

    def free_singles(self) -> np.ndarray:
        """Free pages of broken extents, and those in none."""
        return self._singles.values().copy()

    def set_free_singles(self, pages: np.ndarray) -> None:
        """As many others are free now: whoever moved pages says which."""
        assert len(pages) == self._singles.size
        self._singles.pop(len(pages))
        self.give_pages(pages)

    def _pages_of(self, starts: np.ndarray) -> np.ndarray:
        # Layer by layer, so that the pages of adjacent extents are runs.
        layers = np.arange(self.layers, dtype=np.int32)
        pages: np.ndarray = (self.stride * layers[:, None] + starts).reshape(-1)
        return pages

    def _coalesce(self) -> None:
        """Single pages that together make whole extents become extents again."""
        if not self._returned:
            return
        self._returned = 0
        singles = self._singles.pop(self._singles.size)
        in_extents = singles < self.layers * self.stride
        extent = np.where(in_extents, singles % self.stride, 0)  # 0 is never given back
        whole = np.flatnonzero(np.bincount(extent[in_extents]) == self.layers)
        self._extents.push(whole[::-1])
        self._singles.push(singles[~np.isin(extent, whole)])

    def write(
        self, slots: torch.Tensor, rows: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Store new K and V at token ``slots``: all ``rows`` of them, or those given."""
        for new, pages in ((k, self.k), (v, self.v)):
            pages.view(-1, *pages.shape[2:])[slots] = new if rows is None else new[rows]

    def layer_view(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V seen by ``layer`` when pages are named by the start of their extent."""
        first = layer * self.stride
        return self.k[first:], self.v[first:]
