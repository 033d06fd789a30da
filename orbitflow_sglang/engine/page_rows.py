"""Which logical pages the rows of SGLang's ``req_to_token`` name, for whoever plans on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch


class PageRows(Protocol):
    """Pages of rows; int32 arrays that are the caller's own."""

    def pages(self, row: int, tokens: int) -> np.ndarray:
        """The pages of a row's first ``tokens`` tokens, in their order."""

    def written(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """SGLang has given slots to the first ``tokens[i]`` tokens of ``rows[i]``."""

    def appended(self, rows: Sequence[int], tokens: Sequence[int], slots: np.ndarray) -> None:
        """The last of the ``tokens[i]`` tokens of ``rows[i]`` is new, and has ``slots[i]``."""


class HostRows:
    """The table lies in host memory."""

    def __init__(self, pool: Any, page_size: int) -> None:
        self._slots: np.ndarray = pool.req_to_token.numpy()
        self._size = page_size

    def pages(self, row: int, tokens: int) -> np.ndarray:
        return self._slots[row, : tokens : self._size] // self._size

    def written(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        pass

    def appended(self, rows: Sequence[int], tokens: Sequence[int], slots: np.ndarray) -> None:
        pass


class MirroredRows:
    """The table lies on a device: a copy of its pages, read again row by row.

    Rows that prompts are written to are read when that step is announced, all at once; a token
    that is appended tells its page. A row that SGLang rewrites between steps
    (``ReqToTokenPool.write``: the radix tree had the same prefix) is read with those of the next
    step, or when it is asked for. Each read waits for what the current stream was asked before.
    """

    def __init__(self, pool: Any, page_size: int) -> None:
        self._table: torch.Tensor = pool.req_to_token  # slots, int32 [rows, tokens]
        self._size = page_size
        rows, tokens = self._table.shape
        self._pages = np.zeros((rows, -(-tokens // page_size)), dtype=np.int32)
        self._stale: dict[int, int] = {}  # rows to be read again, and of how many tokens
        pool.write = self._noting(pool.write)

    def pages(self, row: int, tokens: int) -> np.ndarray:
        if row in self._stale:
            self._read()
        return self._pages[row, : -(-tokens // self._size)].copy()

    def written(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        self._changed(rows, tokens)
        self._read()

    def appended(self, rows: Sequence[int], tokens: Sequence[int], slots: np.ndarray) -> None:
        last = (np.asarray(tokens, dtype=np.int64) - 1) // self._size
        self._pages[np.asarray(rows, dtype=np.int64), last] = slots // self._size
        self._read()

    def _changed(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        for row, count in zip(rows, tokens, strict=True):
            self._stale[row] = max(count, self._stale.get(row, 0))

    def _noting(self, write: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def noted(indices: Any, values: Any) -> None:
            write(indices, values)
            row, where = indices
            if isinstance(where, slice):  # else of the step that is about to begin
                self._changed([int(row)], [where.stop])

        return noted

    def _read(self) -> None:
        if not self._stale:
            return
        rows, longest = list(self._stale), max(self._stale.values())
        index = torch.tensor(rows, device=self._table.device)
        slots = self._table[:, : longest : self._size].index_select(0, index)
        self._pages[rows, : slots.shape[1]] = slots.cpu().numpy() // self._size
        self._stale.clear()
