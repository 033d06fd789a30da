"""How far a trace outgrows memory, as the paper measures it, and the arena for a given level.

    OVF = sum over steps of max(0, live tokens - arena) / (arena x steps)

A request is live from its arrival on, for as many steps as it says tokens, as if everybody were
let in at once and no step took longer than another (method notes, k).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.workload.requests import TraceRequest

LEVELS = {"vl": 0.05, "lo": 0.12, "ml": 0.22, "md": 0.35, "mh": 0.55, "hi": 0.80}


def live_tokens(trace: Sequence[TraceRequest], step_s: float) -> np.ndarray:
    """Tokens with KV at each step from the first arrival to the last token, ``[steps]``."""
    if not trace:
        return np.zeros(0)
    first = min(one.arrival_s for one in trace)
    begins = [int((one.arrival_s - first) / step_s) for one in trace]
    steps = max(begin + one.output_tokens for begin, one in zip(begins, trace, strict=True))
    live = np.zeros(steps)
    for begin, one in zip(begins, trace, strict=True):
        live[begin : begin + one.output_tokens] += one.input_tokens + np.arange(one.output_tokens)
    return live


def overflow(trace: Sequence[TraceRequest], step_s: float, arena_tokens: int) -> float:
    """OVF of the trace in an arena of that size; 0: it never outgrows it."""
    live = live_tokens(trace, step_s)
    return float(np.maximum(0, live - arena_tokens).sum() / (arena_tokens * max(1, len(live))))


def arena_for(trace: Sequence[TraceRequest], step_s: float, level: float) -> int:
    """Tokens of the smallest arena in which OVF is at most ``level``, by bisection."""
    live = live_tokens(trace, step_s)
    low, high = 1, int(live.max(initial=1))
    while low < high:
        middle = (low + high) // 2
        over = np.maximum(0, live - middle).sum() / (middle * len(live))
        low, high = (low, middle) if over <= level else (middle + 1, high)
    return low
