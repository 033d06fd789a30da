"""Pages of live requests grouped into units: what is placed together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Units:
    """Every page of the requests in exactly one unit.

    Unit r, for each request r, is what only that request uses, possibly nothing;
    shared prefixes follow.
    """

    pages: list[IntArray]  # logical pages of each unit

    @property
    def count(self) -> int:
        return len(self.pages)

    @property
    def sizes(self) -> IntArray:
        """Pages of each unit in one layer."""
        return np.array([len(pages) for pages in self.pages], dtype=np.int64)


def group_pages(held: list[NDArray[np.integer]], num_pages: int) -> Units:
    """Group the pages ``held[r]`` of each request r by who uses them.

    ``num_pages`` bounds the page ids. A set of users is known by the sum of random
    64-bit marks of its members.
    """
    marks = np.random.default_rng(0).integers(1, 2**63, size=len(held), dtype=np.uint64)
    users = np.zeros(num_pages, dtype=np.uint64)
    for mark, pages in zip(marks, held, strict=True):
        users[pages] += mark  # a request holds a page once
    used = np.flatnonzero(users)
    order = used[np.argsort(users[used], kind="stable")]
    starts = np.flatnonzero(np.diff(users[order], prepend=np.uint64(0)))
    groups = dict(zip(users[order[starts]].tolist(), np.split(order, starts)[1:], strict=True))
    empty = np.empty(0, dtype=np.int64)
    private = [groups.pop(mark, empty) for mark in marks.tolist()]
    return Units(pages=[*private, *groups.values()])
