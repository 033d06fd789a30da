"""A seeded workload whose KV outgrows a small arena, and how it is spread over time.

The mix is that of the paper, short and long inputs and outputs drawn independently, scaled
to the tiny model on a CPU: inputs a fifth of the paper's, outputs a little more of theirs,
so that decoding and not prefill is the bottleneck. Arrivals are lognormal and bursty.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from eval.bench.measure import random_prompts
from eval.traces import Arrival
from orbitflow_sglang.slo import REQUEST_KEY, SLO

Range = tuple[int, int]
NO_SLO = SLO()


@dataclass(frozen=True)
class Mix:
    """Lengths in tokens, drawn uniformly from one of two ranges, and how bursty arrivals are."""

    short_input: Range = (64, 256)
    long_input: Range = (512, 1536)
    short_output: Range = (32, 96)
    long_output: Range = (160, 384)
    long_inputs: float = 0.5  # share of the requests
    long_outputs: float = 0.5
    cv: float = 2.0  # standard deviation of the time between two arrivals / its mean

    def __post_init__(self) -> None:
        ranges = self.short_input, self.long_input, self.short_output, self.long_output
        if any(not 1 <= low <= high for low, high in ranges):
            raise ValueError(f"each range needs 1 <= low <= high, got {ranges}")
        if self.cv < 0:
            raise ValueError(f"cv must not be negative, got {self.cv}")

    @property
    def longest(self) -> int:
        """Tokens of the largest request that can be drawn, input and output."""
        return self.long_input[1] + self.long_output[1]

    @property
    def mean_input(self) -> float:
        return _mean(self.short_input, self.long_input, self.long_inputs)

    @property
    def mean_output(self) -> float:
        return _mean(self.short_output, self.long_output, self.long_outputs)


@dataclass(frozen=True)
class LiveRequest(Arrival):
    """One request to replay. Equal ``rid`` and seed mean the same prompt."""

    rid: str
    slo: SLO = NO_SLO

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


def draw(mix: Mix, requests: int, seed: int) -> list[LiveRequest]:
    """A trace of so many requests whose mean time between arrivals is 1 s."""
    chance = random.Random(seed)
    sigma = math.sqrt(math.log(1 + mix.cv**2))
    trace, now = [], 0.0
    for index in range(requests):
        inputs = mix.long_input if chance.random() < mix.long_inputs else mix.short_input
        outputs = mix.long_output if chance.random() < mix.long_outputs else mix.short_output
        trace.append(
            LiveRequest(now, chance.randint(*inputs), chance.randint(*outputs), f"r{index:04d}")
        )
        now += chance.lognormvariate(-(sigma**2) / 2, sigma)
    return at_rate(trace, 1.0)


def at_rate(trace: Sequence[LiveRequest], requests_per_s: float) -> list[LiveRequest]:
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


def at_once(trace: Sequence[LiveRequest]) -> list[LiveRequest]:
    """All of it offered at time 0."""
    return [replace(one, arrival_s=0.0) for one in trace]


def with_slo(trace: Sequence[LiveRequest], targets: Targets) -> list[LiveRequest]:
    """Each request with the targets of its length."""
    return [replace(one, slo=targets.of(one.input_tokens)) for one in trace]


def prompts(trace: Sequence[LiveRequest], seed: int) -> list[list[int]]:
    """Random token ids, the same for the same seed; no two share a prefix worth caching."""
    chance = random.Random(seed)
    return [random_prompts(1, one.input_tokens, chance.getrandbits(32))[0] for one in trace]


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


def _mean(short: Range, long: Range, share: float) -> float:
    return (1 - share) * sum(short) / 2 + share * sum(long) / 2
