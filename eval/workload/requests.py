"""A request of a workload, its SLOs, and how a trace is spread over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from eval.traces import Arrival
from orbitflow_sglang.slo import REQUEST_KEY, SLO

NO_SLO = SLO()


@dataclass(frozen=True)
class TraceRequest(Arrival):
    """One request to serve. Equal ``rid`` and seed mean the same prompt."""

    rid: str
    slo: SLO = NO_SLO
    prefix_id: str = ""  # of those whose prompts begin alike
    prefix_tokens: int = 0  # that these have in common

    @property
    def custom_params(self) -> dict[str, Any]:
        """The targets as a server with OrbitFlow reads them; others ignore them."""
        values: dict[str, Any] = {
            f"{name}_slo_ms": target * 1e3
            for name in ("ttft", "tpot", "tbt")
            if (target := getattr(self.slo, f"{name}_s")) is not None
        }
        if self.slo.deposit:
            values["deposit"] = True
        return {REQUEST_KEY: values} if values else {}


@dataclass(frozen=True)
class Targets:
    """SLOs in seconds. TTFT: ``ttft_s``, or ``prefill_factor`` unloaded prefills if longer."""

    ttft_s: float
    tpot_s: float
    tbt_s: float | None = None  # None: judged by the TPOT target, not sent
    prefill_factor: float = 5.0
    prefill_s: float = 0.0  # unloaded, of a prompt of no tokens
    prefill_s_per_token: float = 0.0

    def of(self, input_tokens: int) -> SLO:
        unloaded = self.prefill_s + self.prefill_s_per_token * input_tokens
        return SLO(max(self.ttft_s, self.prefill_factor * unloaded), self.tpot_s, self.tbt_s)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def at_rate(trace: Sequence[TraceRequest], requests_per_s: float) -> list[TraceRequest]:
    """The trace stretched so that it offers exactly this rate from first to last arrival.

    Exactly, because 200 draws of bursty gaps miss their mean by a fifth: repeats with other
    seeds would be other loads.
    """
    if not (math.isfinite(requests_per_s) and requests_per_s > 0):
        raise ValueError(f"the rate must be above 0, got {requests_per_s}")
    span = trace[-1].arrival_s - trace[0].arrival_s if trace else 0.0
    scale = (len(trace) - 1) / requests_per_s / span if span else 0.0
    first = trace[0].arrival_s if trace else 0.0
    return [replace(one, arrival_s=(one.arrival_s - first) * scale) for one in trace]


def at_once(trace: Sequence[TraceRequest]) -> list[TraceRequest]:
    """All of it offered at time 0."""
    return [replace(one, arrival_s=0.0) for one in trace]


def with_slo(trace: Sequence[TraceRequest], target_of: Callable[[int], SLO]) -> list[TraceRequest]:
    """Each request with the targets of its input tokens, where it has none of its own."""
    return [replace(one, slo=_filled(one.slo, target_of(one.input_tokens))) for one in trace]


def _filled(own: SLO, default: SLO) -> SLO:
    given = {
        name: getattr(own, name) if getattr(own, name) is not None else getattr(default, name)
        for name in ("ttft_s", "tpot_s", "tbt_s")
    }
    return SLO(**given, deposit=own.deposit or default.deposit)
