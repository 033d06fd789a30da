"""The host store: pages of KV in host memory, handed out in long runs.

One (request, layer) should be few contiguous runs, so that a transfer is few
copies. Pages are grouped; a stream of pages that names its last page as ``hint``
goes on behind it, else starts a group of its own, and only when no whole group
is left takes pages where they are.
"""

from __future__ import annotations

import numpy as np

from orbitflow_sglang.residency.layout import KVLayout

RUN_PAGES = 16  # pages a group: the run one stream fills before it takes another


class HostStore:
    """Tensors and a free map. Page ids run from 0 to ``num_pages - 1``."""

    def __init__(self, layout: KVLayout, num_pages: int, pinned_for: str | None = None) -> None:
        """``pinned_for``: the GPU that copies from and to it."""
        self.num_pages = num_pages
        self.k, self.v = layout.empty(num_pages, "cpu", pinned_for)
        self.reset()

    def reset(self) -> None:
        """Every page free again; contents undefined."""
        self._free = np.ones(self.num_pages, dtype=bool)
        self._free_in_group = np.full(self.num_pages // RUN_PAGES, RUN_PAGES, dtype=np.int32)
        self._whole_groups = list(range(len(self._free_in_group)))[::-1]
        self.num_free = self.num_pages

    def is_free(self, pages: np.ndarray) -> np.ndarray:
        """One bool for each of ``pages``."""
        free: np.ndarray = self._free[pages]
        return free

    def take(self, count: int, hint: int = -1) -> np.ndarray:
        """Up to ``count`` pages, int32: fewer when the store is full, never an error.

        They go on behind the page ``hint`` as far as its group is free there; -1: no hint.
        """
        parts: list[np.ndarray] = []
        left = min(count, self.num_free)
        if left and hint >= 0 and (run := self._run_behind(hint, left)):
            parts.append(self._claim(np.arange(hint + 1, hint + 1 + run)))
            left -= run
        while left and (group := self._pop_whole_group()) is not None:
            start = group * RUN_PAGES
            parts.append(self._claim(np.arange(start, start + min(left, RUN_PAGES))))
            left -= len(parts[-1])
        if left:
            parts.append(self._claim(np.flatnonzero(self._free)[:left]))
        return np.concatenate(parts).astype(np.int32) if parts else np.empty(0, np.int32)

    def take_by_layer(self, layers: np.ndarray, hints: np.ndarray) -> np.ndarray:
        """A page for each of ``layers``, int32; -1 where the store is full.

        The pages of one layer are taken together, behind the first of its ``hints``.
        """
        pages = np.full(len(layers), -1, dtype=np.int32)
        for layer in np.unique(layers):
            rows = np.flatnonzero(layers == layer)
            taken = self.take(len(rows), int(hints[rows[0]]))
            pages[rows[: len(taken)]] = taken
        return pages

    def give(self, pages: np.ndarray) -> None:
        """Take back ``pages``, each of which must have an owner; in any order."""
        self._free[pages] = True
        self.num_free += len(pages)
        groups, counts = np.unique(self._grouped(pages), return_counts=True)
        self._free_in_group[groups] += counts.astype(np.int32)
        self._whole_groups.extend(groups[self._free_in_group[groups] == RUN_PAGES].tolist())

    def _claim(self, pages: np.ndarray) -> np.ndarray:
        self._free[pages] = False
        self.num_free -= len(pages)
        np.subtract.at(self._free_in_group, self._grouped(pages), 1)
        return pages

    def _grouped(self, pages: np.ndarray) -> np.ndarray:
        """Groups of those pages that are in one; the last few pages may be in none."""
        groups = pages // RUN_PAGES
        return groups[groups < len(self._free_in_group)]

    def _run_behind(self, page: int, limit: int) -> int:
        """Length of the free run that follows ``page`` in its own group."""
        end = min((page // RUN_PAGES + 1) * RUN_PAGES, page + 1 + limit, self.num_pages)
        taken = np.flatnonzero(~self._free[page + 1 : end])
        return int(taken[0]) if len(taken) else max(0, end - page - 1)

    def _pop_whole_group(self) -> int | None:
        while self._whole_groups:
            group = self._whole_groups.pop()
            # A group may have been used page by page since it was listed.
            if self._free_in_group[group] == RUN_PAGES:
                return group
        return None
