"""When requests come: arrival processes with a mean time of 1 s between two requests.

They set the shape; ``requests.at_rate`` then stretches a trace to exactly its rate.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

Gaps = Iterator[float]
BURST = 8  # requests of a burst, on average
BIMODAL_SHARE = 0.8  # of the gaps that are short
BIMODAL_RATIO = 20.0  # of a long gap to a short one
HELP = "poisson, lognormal:CV, periodic, uniform, bursty or bimodal"


class Process(NamedTuple):
    """An arrival process: endless gaps in seconds, mean 1."""

    name: str
    gaps: Callable[[random.Random], Gaps]


def find(name: str) -> Process:
    """The process of that name. Raises ``ValueError`` that says which there are."""
    kind, _, argument = name.partition(":")
    if kind == "lognormal":
        try:
            cv = float(argument or "2")
        except ValueError:
            cv = math.nan
        if not (math.isfinite(cv) and cv >= 0):
            raise ValueError(f"{name!r}: lognormal:CV needs a number of at least 0")
        return Process(name, lambda chance: _lognormal(chance, cv))
    if kind not in _PROCESSES or argument:
        raise ValueError(f"unknown arrival process {name!r}: use {HELP}")
    return Process(name, _PROCESSES[kind])


def _lognormal(chance: random.Random, cv: float) -> Gaps:
    """Gaps whose standard deviation is ``cv`` times their mean."""
    sigma = math.sqrt(math.log(1 + cv**2))
    while True:
        yield chance.lognormvariate(-(sigma**2) / 2, sigma)


def _poisson(chance: random.Random) -> Gaps:
    while True:
        yield chance.expovariate(1.0)


def _periodic(chance: random.Random) -> Gaps:
    while True:
        yield 1.0


def _uniform(chance: random.Random) -> Gaps:
    while True:
        yield chance.uniform(0.0, 2.0)


def _bursty(chance: random.Random) -> Gaps:
    """Bursts come as a Poisson process; the size of one is geometric."""
    while True:
        size = 1 + int(math.log(1 - chance.random()) / math.log(1 - 1 / BURST))
        yield chance.expovariate(1.0 / BURST)
        for _ in range(size - 1):
            yield 0.0


def _bimodal(chance: random.Random) -> Gaps:
    """Short gaps mostly, and long ones."""
    short = 1.0 / (BIMODAL_SHARE + (1 - BIMODAL_SHARE) * BIMODAL_RATIO)
    while True:
        mean = short if chance.random() < BIMODAL_SHARE else short * BIMODAL_RATIO
        yield chance.uniform(0.5, 1.5) * mean


_PROCESSES: dict[str, Callable[[random.Random], Gaps]] = {
    "poisson": _poisson,
    "periodic": _periodic,
    "uniform": _uniform,
    "bursty": _bursty,
    "bimodal": _bimodal,
}
