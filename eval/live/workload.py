"""A seeded workload whose KV outgrows a small arena, and how it is spread over time.

The mix is that of the paper, short and long inputs and outputs drawn independently, scaled
to the tiny model on a CPU: inputs a fifth of the paper's, outputs a little more of theirs,
so that decoding and not prefill is the bottleneck. Arrivals are lognormal and bursty.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from eval.bench.measure import random_prompts
from eval.workload.requests import TraceRequest, at_rate

Range = tuple[int, int]


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


def draw(mix: Mix, requests: int, seed: int) -> list[TraceRequest]:
    """A trace of so many requests whose mean time between arrivals is 1 s."""
    chance = random.Random(seed)
    sigma = math.sqrt(math.log(1 + mix.cv**2))
    trace, now = [], 0.0
    for index in range(requests):
        inputs = mix.long_input if chance.random() < mix.long_inputs else mix.short_input
        outputs = mix.long_output if chance.random() < mix.long_outputs else mix.short_output
        trace.append(
            TraceRequest(now, chance.randint(*inputs), chance.randint(*outputs), f"r{index:04d}")
        )
        now += chance.lognormvariate(-(sigma**2) / 2, sigma)
    return at_rate(trace, 1.0)


def prompts(trace: Sequence[TraceRequest], seed: int) -> list[list[int]]:
    """Random token ids, the same for the same seed; no two share a prefix worth caching."""
    chance = random.Random(seed)
    return [random_prompts(1, one.input_tokens, chance.getrandbits(32))[0] for one in trace]


def _mean(short: Range, long: Range, share: float) -> float:
    return (1 - share) * sum(short) / 2 + share * sum(long) / 2
