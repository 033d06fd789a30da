"""When tokens of one request may leave, and how the times at which they came compare with its SLO.

Times are seconds of one monotonic clock; which one does not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from orbitflow_sglang.slo import PACE, SLO, STRICT_GAP_S


class Pacer:
    """Releases token k at t1 + (k - 1) PACE p, or at once where that has passed.

    t1 is when token 1 was delivered and p the pace of the SLO; without one nothing is held.
    """

    def __init__(self, slo: SLO) -> None:
        self.slo = slo
        self.first_s: float | None = None

    def delivered(self, now_s: float) -> None:
        """Tokens have been delivered: the first time starts the clock."""
        if self.first_s is None:
            self.first_s = now_s

    def due_s(self, token: int) -> float:
        """From when on token ``token`` (from 1) may leave; inf: not before token 1 has."""
        if token <= 1 or self.slo.pace_s is None:
            return -math.inf
        return math.inf if self.first_s is None else self.first_s + self.slo.release_s(token)

    def deliverable(self, generated: int, now_s: float) -> int:
        """How many of the first ``generated`` tokens may have left at ``now_s``."""
        if self.slo.pace_s is None:
            return generated
        if self.first_s is None:
            return min(generated, 1)
        tokens = 1 + int(max(0.0, now_s - self.first_s) / (PACE * self.slo.pace_s))
        # A quotient rounds where due_s adds: due_s decides, or a wait for it might not end.
        while tokens > 1 and self.due_s(tokens) > now_s:
            tokens -= 1
        while tokens < generated and self.due_s(tokens + 1) <= now_s:
            tokens += 1
        return min(tokens, generated)


@dataclass(frozen=True)
class Attainment:
    """Which targets one request met; a target that it does not have is met."""

    ttft: bool
    tpot: bool
    tbt: bool
    no_stall: bool  # no gap above STRICT_GAP_S

    @property
    def good(self) -> bool:
        """TTFT and TPOT were met."""
        return self.ttft and self.tpot

    @property
    def strict(self) -> bool:
        """Good, and nobody who reads along saw it stall."""
        return self.good and self.no_stall

    @staticmethod
    def of(
        slo: SLO, ttft_s: float | None, tpot_s: float | None, max_tbt_s: float | None
    ) -> Attainment:
        """None: not measured. Without a first token the TTFT is missed, without gaps none is."""
        return Attainment(
            ttft=slo.ttft_s is None or (ttft_s is not None and ttft_s <= slo.ttft_s),
            tpot=_within(tpot_s, slo.tpot_s),
            tbt=_within(max_tbt_s, slo.tbt_s),
            no_stall=_within(max_tbt_s, STRICT_GAP_S),
        )


def _within(measured: float | None, target: float | None) -> bool:
    return measured is None or target is None or measured <= target


@dataclass(slots=True)
class TokenTimes:
    """What the times of a request's tokens come to; each event costs the same, however long it is.

    ``slo`` judges each gap when it ends, so it may become known late, but not change.
    """

    arrival_s: float
    slo: SLO
    tokens: int = 0
    first_s: float | None = None
    last_s: float = 0.0
    largest_gap_s: float = 0.0
    late_gaps: int = 0  # above the TBT target

    def add(self, now_s: float, tokens: int) -> None:
        """``tokens`` more at ``now_s``; among themselves they have gaps of 0."""
        if tokens <= 0:
            return
        if self.first_s is None:
            self.first_s = now_s
        else:
            gap = now_s - self.last_s
            self.largest_gap_s = max(self.largest_gap_s, gap)
            self.late_gaps += not _within(gap, self.slo.tbt_s)
        self.last_s = now_s
        self.tokens += tokens

    @property
    def ttft_s(self) -> float | None:
        """From arrival to the first token."""
        return None if self.first_s is None else self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None below 2 tokens."""
        if self.first_s is None or self.tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.tokens - 1)

    @property
    def max_tbt_s(self) -> float | None:
        """Largest gap between a token and the next; None below 2 tokens."""
        return None if self.tokens < 2 else self.largest_gap_s

    @property
    def attainment(self) -> Attainment:
        return Attainment.of(self.slo, self.ttft_s, self.tpot_s, self.max_tbt_s)

    @property
    def violations(self) -> int:
        """A missed TTFT, a missed TPOT and each gap above the TBT target count 1."""
        met = self.attainment
        return (not met.ttft) + (not met.tpot) + self.late_gaps

    @property
    def deposit_tokens(self) -> float:
        """Generated minus due at the last token; see ``SLO.deposit_tokens``."""
        since_first = 0.0 if self.first_s is None else self.last_s - self.first_s
        return self.slo.deposit_tokens(self.tokens, since_first)

    def report(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "max_tbt_s": self.max_tbt_s,
            "violations": self.violations,
        }
