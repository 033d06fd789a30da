"""Every Prometheus series of OrbitFlow, as a table: what is exported, documented and drawn.

``engine/metrics.py`` fills them. Names come behind ``PREFIX``; those of counters end in
``_total``. Series of the controller, and attainment as generated, are there under policies that
have one, all others always.
Pages are pages of one layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from orbitflow_sglang.control.deposit import Attainment

PREFIX = "sglang:orbitflow_"
SOLVE_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
OUTCOMES = ("reused", "repaired", "cached", "solved", "late", "failed", "invalid")
SOURCES = ("planned", "kept", "greedy")

Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True)
class Series:
    """One metric; ``label`` comes on top of SGLang's own labels and takes ``values``."""

    name: str
    kind: Kind
    text: str
    label: str | None = None
    values: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    def sample_names(self) -> tuple[str, ...]:
        """The names that ``/metrics`` shows it under."""
        if self.kind != "histogram":
            return (self.full_name,)
        return tuple(f"{self.full_name}_{part}" for part in ("bucket", "sum", "count"))


STORE_SERIES = (
    Series("arena_pages", "gauge", "Pages of the device arena outside the ring."),
    Series("arena_pages_free", "gauge", "Free pages of the device arena."),
    Series("ring_pages", "gauge", "Pages of the staging ring."),
    Series("staged_pages", "gauge", "Pages of the ring in use."),
    Series("host_pages", "gauge", "Pages of the host store."),
    Series("host_pages_free", "gauge", "Free pages of the host store."),
    Series("pages_in_use", "gauge", "Pages that hold KV, on the device or the host."),
    Series("h2d_bytes_total", "counter", "Bytes of KV moved from host to device."),
    Series("d2h_bytes_total", "counter", "Bytes of KV moved from device to host."),
    Series("h2d_seconds_total", "counter", "Time that transfers to the device took."),
    Series("d2h_seconds_total", "counter", "Time that transfers to the host took."),
    Series("stall_seconds_total", "counter", "Time that compute waited for pages to arrive."),
    Series("steps_total", "counter", "Forward passes."),
    Series(
        "tiered_steps_total", "counter", "Forward passes with pages on the host or on the move."
    ),
    Series("placements_total", "counter", "Times that a placement was made."),
    Series("failed_idle_checks_total", "counter", "Idle checks that found a violated invariant."),
    Series("failed_steps_total", "counter", "Steps that failed, after which all KV was given up."),
)
CONTROLLER_SERIES = (
    Series("hidden_pages", "gauge", "Pages that a step can fetch under its compute."),
    Series("stream_budget_pages", "gauge", "Pages that a step may fetch (S_max)."),
    Series("streamed_pages", "gauge", "Pages that a step fetches by the plan in force."),
    Series(
        "plans_total", "counter", "Plans put in force, by where each came from.", "source", SOURCES
    ),
    Series(
        "plan_outcomes_total", "counter", "What came of questions to the planner.",
        "outcome", OUTCOMES,
    ),
    Series("plan_solve_seconds", "histogram", "Time to find a plan that was put in force."),
    Series("planner_restarts_total", "counter", "Times that the planner's process was replaced."),
    Series("step_seconds", "gauge", "Decode step as measured, median of the last 256."),
    Series("step_predicted_seconds", "gauge", "Decode step as predicted, median of the last 256."),
    Series("step_ratio", "gauge", "Measured / predicted decode step, median of the last 256."),
    Series("cost_drifts_total", "counter", "Times that steps came to differ from the prediction."),
    Series("pauses_total", "counter", "Times that a request was set aside."),
    Series("resumes_total", "counter", "Times that a request set aside decoded again."),
    Series("pauses_missed_total", "counter", "Pauses that came too late to carry out."),
    Series("retractions_total", "counter", "Requests that gave up their KV, paused ones too."),
    Series("paused_requests", "gauge", "Requests set aside now."),
    Series("paused_longest_seconds", "gauge", "Longest that one of them has been set aside."),
    Series("waiting_longest_seconds", "gauge", "Longest that a request waits for its prefill."),
    Series(
        "deposit_least_seconds", "gauge",
        "Least lead of a running or paused request over its pace; below 0: behind.",
    ),
    Series("deposit_median_seconds", "gauge", "Median of the same."),
    Series("behind_requests", "gauge", "Running or paused requests that are behind their pace."),
)  # fmt: skip

# Which requests each series counts, by what is left of its name between slo_ and _total.
ATTAINED: dict[str, tuple[str, Callable[[Attainment], bool]]] = {
    "requests": ("Requests that finished.", lambda met: True),
    "ttft_met": ("Of those, with the TTFT in time.", lambda met: met.ttft),
    "tpot_met": ("Of those, with the TPOT in time.", lambda met: met.tpot),
    "tbt_met": ("Of those, with no gap above the TBT target.", lambda met: met.tbt),
    "good": ("Of those, with TTFT and TPOT in time.", lambda met: met.good),
    "strict": ("Of the good ones, without a gap above 1 s.", lambda met: met.strict),
}
KINDS = ("generated", "delivered")  # as tokens left the scheduler, and as they left the server
SLO_SERIES = tuple(
    Series(f"slo_{name}_total", "counter", text, "kind", KINDS)
    for name, (text, _) in ATTAINED.items()
)
SERIES = (*STORE_SERIES, *CONTROLLER_SERIES, *SLO_SERIES)


def sample_names() -> Iterator[str]:
    """Every name of ours under ``/metrics``."""
    for series in SERIES:
        yield from series.sample_names()


def count_attainment(counts: Counter[str], met: Attainment) -> None:
    """One finished request into ``counts``, by the keys of ``ATTAINED``."""
    for name, (_, holds) in ATTAINED.items():
        counts[name] += holds(met)
