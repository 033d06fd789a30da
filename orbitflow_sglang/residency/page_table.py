"""Where each (layer, logical page) is: arrays only, no policy and no copies.

All arrays are NumPy on the host, ``[layers, logical_pages]`` unless said
otherwise. Page ids are int32; -1 means none.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class PageState(IntEnum):
    """State of one page in one layer; exactly one holds at any time."""

    FREE = 0
    DEVICE = 1  # in the arena; no valid host copy
    HOST = 2  # in the host store only
    BOTH = 3  # in the arena, host copy valid
    STAGED = 4  # in the ring for this pass, host copy valid
    TO_DEVICE = 5  # H2D under way into the ring or the arena, host copy valid
    TO_HOST = 6  # D2H under way; the arena copy, where there is one, stays readable


class PageTable:
    """The tables and the questions asked of them."""

    def __init__(self, layers: int, logical_pages: int, extent_stride: int) -> None:
        shape = (layers, logical_pages + 1)  # page 0 absorbs padding, as in SGLang
        self.layers = layers
        self._in_extent = extent_stride * np.arange(layers, dtype=np.int32)  # behind its start
        self.state = np.zeros(shape, dtype=np.uint8)
        self.device_page = np.full(shape, -1, dtype=np.int32)
        self.host_page = np.full(shape, -1, dtype=np.int32)
        # The placement asked for: True where the page should live on the host.
        self.want_host = np.zeros(shape, dtype=bool)
        # [logical_pages]: first arena page when in the arena in one extent, whether or not
        # the host has copies too; else -1.
        self.extent = np.full(shape[1], -1, dtype=np.int32)
        self.in_use = np.zeros(shape[1], dtype=bool)
        # [logical_pages]: raised when the page is freed, so that what was started
        # for its last owner is told from what belongs to the present one.
        self.generation = np.zeros(shape[1], dtype=np.int64)
        self.last_used = np.zeros(shape[1], dtype=np.int64)
        self.reset()

    def reset(self) -> None:
        self.state[:] = PageState.FREE
        self.device_page[:] = -1
        self.host_page[:] = -1
        self.want_host[:] = False
        self.extent[:] = -1
        self.in_use[:] = False
        self.generation += 1
        self.last_used[:] = 0
        # Page 0 is resident for good: the arena's first extent.
        self.state[:, 0] = PageState.DEVICE
        self.device_page[:, 0] = self._in_extent
        self.extent[0] = 0
        self.in_use[0] = True

    def pages_in_use(self) -> np.ndarray:
        """Logical pages with an owner, page 0 left out."""
        return np.flatnonzero(self.in_use)[1:]

    def mask(self, *pages: np.ndarray) -> np.ndarray:
        """Whether each logical page is among ``pages``, integers."""
        found = np.zeros_like(self.in_use)
        for some in pages:
            found[some] = True
        return found

    def claim(self, pages: np.ndarray) -> None:
        self.in_use[pages] = True

    def release(self, pages: np.ndarray) -> None:
        """Forget everything about ``pages``; their physical pages are the caller's."""
        self.state[:, pages] = PageState.FREE
        self.device_page[:, pages] = -1
        self.host_page[:, pages] = -1
        self.want_host[:, pages] = False
        self.extent[pages] = -1
        self.in_use[pages] = False
        self.generation[pages] += 1

    def extent_pages(self, start: int) -> np.ndarray:
        """The arena pages of an extent, ``[layers]``."""
        pages: np.ndarray = start + self._in_extent
        return pages

    def set_extents(self, pages: np.ndarray, starts: np.ndarray) -> None:
        """The arena pages of ``pages`` are those of one extent each."""
        self.extent[pages] = starts
        self.device_page[:, pages] = starts + self._in_extent[:, None]

    def break_extents(self, pages: np.ndarray) -> None:
        """Some layer of ``pages`` is about to leave: from here on each counts by itself."""
        self.extent[pages] = -1


def whole_pages(columns: np.ndarray, count: int) -> slice:
    """The first ``count`` of ``columns`` (ascending), and what else belongs to the last one."""
    if count <= 0:
        return slice(0)
    last = columns[:count][-1:]
    return slice(int(np.searchsorted(columns, last[0], "right")) if len(last) else 0)
