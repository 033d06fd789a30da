"""What the engine and the store say to each other about one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

NO_PAGES = np.empty(0, dtype=np.int64)


def _no_pages() -> np.ndarray:
    return NO_PAGES


@dataclass
class Step:
    """One forward pass, in logical pages. All arrays are int64, each page once in each."""

    reads: list[np.ndarray]  # per request: pages with the tokens it attends to, in order
    read_tokens: list[int]  # per request: tokens of those pages; only the last may be part filled
    slots: np.ndarray  # token slots written, one per row of K and V
    # New pages that stay open behind this pass. They, and new pages that are also in
    # ``reads``, are in the arena during it; a page that it fills may be given here too.
    new_tails: np.ndarray = field(default_factory=_no_pages)
    new_full: np.ndarray = field(default_factory=_no_pages)  # new pages that this pass fills
    # First row of K and V of each of ``new_full``.
    new_full_rows: np.ndarray = field(default_factory=_no_pages)
    # Tails of all live requests, and older pages that this pass goes on writing: they
    # stay in the arena alone. Those that are new in this pass may be among them.
    open_pages: np.ndarray = field(default_factory=_no_pages)
    # Pages of live requests outside this pass, their tails too.
    idle_pages: np.ndarray = field(default_factory=_no_pages)

    def part(self, wanted: np.ndarray, page_size: int) -> tuple[list[np.ndarray], list[int]]:
        """What is read, pages and tokens of each request, of the pages where ``wanted``, bool."""
        reads, tokens = [], []
        for read, total in zip(self.reads, self.read_tokens, strict=True):
            chosen = wanted[read]
            reads.append(read[chosen])
            unfilled = len(read) * page_size - total if len(read) and chosen[-1] else 0
            tokens.append(len(reads[-1]) * page_size - unfilled)
        return reads, tokens


@dataclass
class LayerPass:
    """A part of one layer's attention: what may be read at once.

    ``ids`` are arena pages, integers, ``counts[i]`` of them of request i, which hold
    ``tokens[i]`` tokens, the last page perhaps partly filled; there may be none. ``k`` and
    ``v``, ``[pages, page_size, kv_heads, dim]``, are what the page ids index.
    """

    k: torch.Tensor
    v: torch.Tensor
    ids: torch.Tensor
    counts: list[int]
    tokens: list[int]
    whole: bool  # it is all that the layer attends to

    @property
    def pages(self) -> list[torch.Tensor]:
        """The pages of each request."""
        return list(self.ids.split_with_sizes(self.counts))
