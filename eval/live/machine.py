"""How much of the machine others took while something was measured."""

from __future__ import annotations

import time

import psutil

DISTURBED_CORES = 0.2  # above it a run is marked: one of two cores is the server's compute


class OthersLoad:
    """Cores used by processes that are neither this one nor its descendants.

    Start it when all own processes run: what a process did before it ended is not seen.
    """

    def __init__(self) -> None:
        self._began = time.monotonic(), _busy_s(), _own_s()

    def cores(self) -> float:
        """The average since the start."""
        began, busy_s, own_s = self._began
        elapsed = max(time.monotonic() - began, 1e-3)
        return max(0.0, (_busy_s() - busy_s) - (_own_s() - own_s)) / elapsed


def _busy_s() -> float:
    """CPU seconds of the whole machine; what the hypervisor took away counts as others'."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # guest time is part of user time
    return float(sum(value for name, value in times.items() if name not in idle))


def _own_s() -> float:
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return float(total)
