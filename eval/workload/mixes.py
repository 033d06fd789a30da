"""The paper's request types and mixes: short or long input, short or long output.

    SS, SL, LS, LL         one type (input first)
    MIX                    a quarter of each
    SS:1+LL:3              a blend, by shares
    MIX*4                  inputs and outputs four times as long

Short: 128, 256 or 512 tokens; long inputs 4,096 or 8,192; each within 20 %, uniformly
(method notes, k). Long outputs are 1,024 or 2,048 and not the paper's 4,096 or 8,192, so
that a run of 200 requests stays a matter of seconds; ``:full`` behind a mix restores them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from eval.workload import arrivals
from eval.workload.requests import TraceRequest, at_rate

TYPES = ("SS", "SL", "LS", "LL")
SHORT = (128, 256, 512)
LONG_INPUT = (4096, 8192)
LONG_OUTPUT = (1024, 2048)
FULL_OUTPUT = (4096, 8192)
JITTER = 0.2  # share by which a length differs from its bin
FULL = ":full"


@dataclass(frozen=True)
class Mix:
    """Shares of the four types, and what long means. ``scale`` multiplies all lengths."""

    name: str
    shares: tuple[float, float, float, float]  # of SS, SL, LS, LL
    long_output: tuple[int, ...] = LONG_OUTPUT
    scale: float = 1.0

    @property
    def mean_input(self) -> float:
        """Tokens of a prompt, on average."""
        return self._mean(self.shares[2] + self.shares[3], LONG_INPUT)

    @property
    def mean_output(self) -> float:
        """Tokens of an answer, on average."""
        return self._mean(self.shares[1] + self.shares[3], self.long_output)

    def _mean(self, long: float, bins: tuple[int, ...]) -> float:
        mean = (1 - long) * sum(SHORT) / len(SHORT) + long * sum(bins) / len(bins)
        return self.scale * mean

    @property
    def mean_tokens(self) -> float:
        """What a request holds of memory, half its output said."""
        return self.mean_input + self.mean_output / 2


def find(name: str) -> Mix:
    """The mix of that name. Raises ``ValueError`` that says how they are written."""
    text, star, factor = name.partition("*")
    full = text.endswith(FULL)
    shares = dict.fromkeys(TYPES, 0.0)
    try:
        scale = float(factor) if star else 1.0
        body = text.removesuffix(FULL)
        for part in "+".join(TYPES).split("+") if body == "MIX" else body.split("+"):
            kind, _, weight = part.partition(":")
            shares[kind] += float(weight or 1)
        total = sum(shares.values())
        if set(shares) != set(TYPES) or not total > 0 or min(shares.values()) < 0 or not scale > 0:
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(
            f"unknown mix {name!r}: use MIX, one of {', '.join(TYPES)}, or a blend as SS:1+LL:3, "
            "with :full for the paper's long outputs and *N for N times the lengths"
        ) from None
    ordered = tuple(shares[kind] / total for kind in TYPES)
    mix = Mix(name, (ordered[0], ordered[1], ordered[2], ordered[3]), scale=scale)
    return replace(mix, long_output=FULL_OUTPUT) if full else mix


def draw(mix: Mix, requests: int, process: str, seed: int) -> list[TraceRequest]:
    """A trace of so many requests at 1 request/s."""
    chance = random.Random(seed)
    gaps = arrivals.find(process).gaps(random.Random(seed + 1_000_003))
    trace, now = [], 0.0
    for number in range(requests):
        kind = chance.choices(TYPES, mix.shares)[0]
        lengths = []
        for size, bins in zip(kind, (LONG_INPUT, mix.long_output), strict=True):
            middle = chance.choice(SHORT if size == "S" else bins)
            length = chance.uniform(1 - JITTER, 1 + JITTER) * middle * mix.scale
            lengths.append(max(1, round(length)))
        trace.append(TraceRequest(now, lengths[0], lengths[1], f"r{number:04d}"))
        now += next(gaps)
    return at_rate(trace, 1.0)
