"""Whom of a long line a step looks at, so that what a decision takes has a bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

from orbitflow_sglang.control.view import RequestView

KEPT = 192  # first in line when last looked at
NEXT = 64  # of the others, in turns


class Line:
    """Those that wait. A line of up to ``KEPT + NEXT`` is looked at as a whole; of a longer one
    those that were first in it, who has waited longest, whoever is new, and the others in turns,
    all of them within about ``len(waiting) / NEXT`` steps.

    Time goes by for all alike, so who is left out seldom gets ahead of those looked at.
    """

    def __init__(self) -> None:
        self._first: frozenset[str] = frozenset()
        self._newest_s = -math.inf  # arrival of the newest one seen
        self._next = 0  # place of the next turn

    def looked_at(self, waiting: list[RequestView]) -> list[RequestView]:
        """Whom this step looks at, as they stand in ``waiting``."""
        if len(waiting) <= KEPT + NEXT:
            return waiting
        begin = self._next if self._next < len(waiting) else 0
        self._next = end = begin + NEXT
        first, newest_s = self._first, self._newest_s
        oldest = min(waiting, key=attrgetter("arrival_s"))
        self._newest_s = max(newest_s, *(view.arrival_s for view in waiting))
        return [
            view
            for place, view in enumerate(waiting)
            if view.rid in first
            or begin <= place < end
            or view.arrival_s > newest_s
            or view is oldest
        ]

    def ordered(self, rids: Sequence[str]) -> None:
        """Those looked at, first to start first."""
        self._first = frozenset(rids[:KEPT])
