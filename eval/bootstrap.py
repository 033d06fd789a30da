"""Intervals by resampling, and when two contestants count as a tie.

Requests of one run share its queues: two runs of the same differ by more than their requests,
resampled one by one, do. So differences are resampled in two levels, repeats and the requests
in each. A share's interval is of the requests that there were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

DRAWS = 2000
Key = tuple[int, str]  # repeat and request id


@dataclass(frozen=True)
class Interval:
    """A value and the 95 % interval of the resampled ones."""

    value: float
    low: float
    high: float

    @property
    def tie(self) -> bool:
        """Of a difference: 0 lies inside."""
        return self.low <= 0.0 <= self.high

    def as_dict(self) -> dict[str, Any]:
        return {name: round(value, 5) for name, value in asdict(self).items()}


def share_interval(counted: Sequence[float], of: Sequence[float], seed: int = 0) -> Interval:
    """Of sum(counted) / sum(of), over requests."""
    if not sum(of):
        return Interval(float("nan"), float("nan"), float("nan"))
    pairs = np.array([counted, of], dtype=float)
    sums = pairs[:, _resampled(len(of), seed)].sum(axis=2)
    return _interval(pairs[0].sum() / pairs[1].sum(), sums[0] / np.maximum(sums[1], 1e-12))


def paired_difference(
    ours: Mapping[Key, float], theirs: Mapping[Key, float], seed: int = 0
) -> Interval:
    """Of the mean of ``ours`` minus that of ``theirs`` over the requests that both served;
    of a single repeat, how much that one differs from others is not in the interval.

    Raises ``ValueError`` where there is none: they did not see the same trace.
    """
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise ValueError("the two have no request in common")
    repeats: dict[int, list[float]] = {}
    for key in common:
        repeats.setdefault(key[0], []).append(ours[key] - theirs[key])
    each = [np.array(differences) for differences in repeats.values()]
    return _interval(float(np.concatenate(each).mean()), _two_level_means(each, seed))


def _two_level_means(repeats: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Means of ``DRAWS`` samples: as many repeats as there are, as many requests of each."""
    chance = np.random.default_rng(seed)
    times = chance.multinomial(len(repeats), [1 / len(repeats)] * len(repeats), size=DRAWS)
    sums, counts = np.zeros(DRAWS), np.zeros(DRAWS)
    for taken, values in zip(times.T, repeats, strict=True):
        for turn in range(len(repeats)):
            draws = np.flatnonzero(taken > turn)
            picked = chance.integers(0, len(values), size=(len(draws), len(values)))
            sums[draws] += values[picked].sum(axis=1)
            counts[draws] += len(values)
    return sums / counts


def _resampled(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, size=(DRAWS, count))


def _interval(value: float, draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))
