"""What a replay is judged by. Pure: token times in, numbers out.

Everything counts over all requests that arrived: one that failed, or was cut short, is not
good, and its missing tokens and gaps are not in time. Times are seconds after the *planned*
arrival, so a client that sends late only makes a server look worse.

``delivered`` is what the client saw; ``generated`` what the server says it would have seen
without paced delivery (for a server that says nothing the same). Requests with paced
delivery can be good only by the first, those that stalled inside by the second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from orbitflow_sglang.slo import PACE, SLO, STRICT_GAP_S


@dataclass(frozen=True)
class Generated:
    """The server's own times of one request: no delivery, no pacing."""

    ttft_s: float
    tpot_s: float | None  # None: a single token
    max_tbt_s: float | None


@dataclass(frozen=True)
class Served:
    """One request as it was served; ``token_s`` has one entry per token that arrived."""

    rid: str
    repeat: int
    arrival_s: float  # since the start of the replay
    asked_tokens: int
    slo: SLO
    token_s: tuple[float, ...]  # since arrival, ascending
    error: str | None = None
    generated: Generated | None = None

    @property
    def complete(self) -> bool:
        return self.error is None and len(self.token_s) == self.asked_tokens

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.token_s)]

    @property
    def ttft_s(self) -> float:
        """Infinite without a token: so that percentiles count who waited in vain."""
        return self.token_s[0] if self.token_s else math.inf

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; 0 where one was asked for."""
        if not self.complete:
            return math.inf
        later = self.asked_tokens - 1
        return (self.token_s[-1] - self.token_s[0]) / later if later > 0 else 0.0

    @property
    def worst_gap_s(self) -> float:
        return max(self.gaps_s, default=0.0)

    @property
    def tbt_slo_s(self) -> float:
        """The TBT target, or where there is none the TPOT target."""
        target = self.slo.tpot_s if self.slo.tbt_s is None else self.slo.tbt_s
        return math.inf if target is None else target


def ttft_ok(one: Served) -> bool:
    return one.ttft_s <= _limit(one.slo.ttft_s) and bool(one.token_s)


def tpot_ok(one: Served) -> bool:
    return one.complete and one.tpot_s <= _limit(one.slo.tpot_s)


def good(one: Served) -> bool:
    """TTFT and TPOT within their targets, as delivered."""
    return ttft_ok(one) and tpot_ok(one)


def strict(one: Served) -> bool:
    """Good, and nobody who reads along met a stall."""
    return good(one) and one.worst_gap_s <= STRICT_GAP_S


def good_generated(one: Served) -> bool:
    """TTFT and TPOT within their targets by the server's own times."""
    if one.generated is None or not one.complete:
        return good(one)
    ttft, tpot = one.generated.ttft_s, one.generated.tpot_s or 0.0
    return ttft <= _limit(one.slo.ttft_s) and tpot <= _limit(one.slo.tpot_s)


def strict_generated(one: Served) -> bool:
    if one.generated is None or not one.complete:
        return strict(one)
    return good_generated(one) and (one.generated.max_tbt_s or 0.0) <= STRICT_GAP_S


def tokens_on_time(one: Served) -> int:
    """Tokens k there by arrival + TTFT target + (k - 1) TPOT target."""
    ttft, tpot = _limit(one.slo.ttft_s), _limit(one.slo.tpot_s)
    if math.isinf(ttft) or math.isinf(tpot):  # no target: whatever arrived
        return len(one.token_s)
    return sum(at <= ttft + index * tpot for index, at in enumerate(one.token_s))


def gaps_in_time(one: Served, gaps_s: Sequence[float]) -> int:
    return sum(gap <= one.tbt_slo_s for gap in gaps_s)


def tbt_ok(one: Served, gaps_s: Sequence[float]) -> bool:
    """Every gap within the TBT target, and none missing."""
    return one.complete and gaps_in_time(one, gaps_s) == len(gaps_s)


def paced_gaps_s(one: Served) -> list[float]:
    """The gaps that a client sees that holds early tokens back, whatever the server does.

    Token k is shown at the later of its arrival and t1 + (k - 1) 0.95 p.
    """
    pace = one.slo.pace_s or 0.0
    shown = [max(at, one.token_s[0] + index * PACE * pace) for index, at in enumerate(one.token_s)]
    return [later - earlier for earlier, later in pairwise(shown)]


PER_REQUEST = {
    "good": good,
    "strict": strict,
    "good_generated": good_generated,
    "strict_generated": strict_generated,
    "ttft_ok": ttft_ok,
    "tpot_ok": tpot_ok,
    "tbt_ok": lambda one: tbt_ok(one, one.gaps_s),
    "tbt_ok_deposited": lambda one: tbt_ok(one, paced_gaps_s(one)),
}


def shares(served: Sequence[Served]) -> dict[str, tuple[list[float], list[float]]]:
    """Every metric that is a share, as (counted, out of how many) of each request."""
    ones = [1.0] * len(served)
    found = {
        name: ([float(test(one)) for one in served], ones) for name, test in PER_REQUEST.items()
    }
    asked = [float(one.asked_tokens) for one in served]
    gaps = [float(max(0, one.asked_tokens - 1)) for one in served]
    found["tokens_on_time"] = [float(tokens_on_time(one)) for one in served], asked
    found["gaps_ok"] = [float(gaps_in_time(one, one.gaps_s)) for one in served], gaps
    deposited = [float(gaps_in_time(one, paced_gaps_s(one))) for one in served]
    found["gaps_ok_deposited"] = deposited, gaps
    return found


def times(served: Sequence[Served]) -> dict[str, float | None]:
    """Latencies over all requests, in seconds; None where it is a request that never came."""
    first = [one.ttft_s for one in served]
    gaps = [gap for one in served for gap in one.gaps_s]
    return {
        "ttft_p50_s": _finite(percentile(first, 50)),
        "ttft_p95_s": _finite(percentile(first, 95)),
        "tbt_p95_s": _finite(percentile(gaps, 95)),
        "worst_gap_s": max(gaps, default=None),
    }


def makespan_s(run: Sequence[Served]) -> float:
    """From the first arrival of one run to its last token."""
    ends = [one.arrival_s + one.token_s[-1] for one in run if one.token_s]
    return max(ends) - min(one.arrival_s for one in run) if ends else math.inf


def tokens_per_s(run: Sequence[Served]) -> float:
    """Delivered tokens of one run over its makespan."""
    makespan = makespan_s(run)
    return sum(len(one.token_s) for one in run) / makespan if makespan > 0 else 0.0


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of all do not exceed; NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def metrics(served: Sequence[Served]) -> dict[str, float | int | None]:
    """All metrics of requests of one or several runs, other than throughput."""
    counted = {name: _ratio(*pair) for name, pair in shares(served).items()}
    errors = sum(not one.complete for one in served)
    return {"requests": len(served), "errors": errors} | counted | times(served)


def by_run(served: Sequence[Served]) -> Mapping[int, list[Served]]:
    """The requests of each repeat."""
    runs: dict[int, list[Served]] = {}
    for one in served:
        runs.setdefault(one.repeat, []).append(one)
    return runs


def _ratio(counted: Sequence[float], of: Sequence[float]) -> float:
    return sum(counted) / sum(of) if sum(of) else math.nan


def _limit(target_s: float | None) -> float:
    return math.inf if target_s is None else target_s


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
